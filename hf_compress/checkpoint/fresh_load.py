"""Run as a script in a process of its own: load a checkpoint and compare its logits.

`python fresh_load.py FOLDER REFERENCE.safetensors DEVICE AUTO_CLASS TRUST_REMOTE_CODE` prints
one line of JSON; the last argument is 0 or 1.
It must not import hf_compress: it stands for a user who does not have the package.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file

NEW_TOKENS = 8


def main(folder: str, reference: str, device: str, auto_class: str, trusts: str) -> None:
    expected = load_file(reference)
    model = (
        getattr(transformers, auto_class)
        .from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=trusts == "1",
            device_map=device,  # a quantized model may not be moved later
        )
        .eval()
    )
    ids = expected["ids"].to(device)
    with torch.no_grad():
        logits = model(ids).logits.float().cpu()
        generated = ids[:1]
        if auto_class == "AutoModelForCausalLM":
            generated = model.generate(
                ids[:1],
                attention_mask=torch.ones_like(ids[:1]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
    wanted = expected["logits"].float()
    error = (logits - wanted).norm() / wanted.norm()
    result = {
        "relative_logit_error": error.item(),
        "generated_tokens": generated.shape[1] - ids.shape[1],
        "imported_hf_compress": "hf_compress" in sys.modules,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
