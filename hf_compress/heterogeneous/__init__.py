"""Checkpoints whose layers differ in width: `modeling_hfc_*.py` lie next to their weights.

Those files need transformers alone; a user without hf_compress loads them with
`trust_remote_code=True`. Everything else here is for us: the configuration that a plan asks for
(`config.py`), and the same classes under transformers' Auto classes (`auto.py`).
"""
