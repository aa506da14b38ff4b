"""What a student is told about its teacher's distributions, in chunks of tokens and fused with
the head, so that logits of all tokens never stand in memory.

Legend: T tokens, C tokens in a chunk, D hidden size, V vocabulary, K tokens named of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

CHUNK = 256
"""Tokens whose logits are in memory at once. Fewer would read the head more often than the
matrix products take."""


@dataclass(frozen=True)
class Objective:
    """What is minimized, the mean over tokens of
    `(1 - cross_entropy) * divergence + cross_entropy * negative log-likelihood`.

    Attributes:
        loss: the divergence, one of `LOSSES`.
        temperature: divides the logits of both; the divergence is multiplied by its square, so
            that gradients stay as large.
        beta: of `jsd`, the teacher's share of the mixture.
        top_k: of `top_k`, the tokens that are told apart.
        cross_entropy: share of the text's own next token in the loss; 1 leaves the teacher out.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int = 64
    cross_entropy: float = 0.0


def _kl(log_a_CV: torch.Tensor, log_b_CV: torch.Tensor) -> torch.Tensor:
    """KL(a || b) of each token, [C]."""
    return torch.linalg.vecdot(log_a_CV.exp(), log_a_CV - log_b_CV)


def forward_kl(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, _: Objective) -> torch.Tensor:
    """KL(teacher || student) (Hinton et al. 2015)."""
    return _kl(log_p_CV, log_q_CV)


def reverse_kl(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, _: Objective) -> torch.Tensor:
    """KL(student || teacher) (Gu et al. 2024, MiniLLM)."""
    return _kl(log_q_CV, log_p_CV)


def jsd(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, objective: Objective) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2024,
    GKD, equation 1)."""
    beta = log_p_CV.new_tensor(objective.beta)
    log_m_CV = torch.logaddexp(log_p_CV + beta.log(), log_q_CV + torch.log1p(-beta))
    return beta * _kl(log_p_CV, log_m_CV) + (1 - beta) * _kl(log_q_CV, log_m_CV)


def top_k(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Forward KL between the teacher's `top_k` tokens and one bucket for all the others."""
    num = min(objective.top_k, log_p_CV.shape[-1] - 1)
    ids_CK = log_p_CV.topk(num).indices
    return _kl(_bucketed(log_p_CV, ids_CK), _bucketed(log_q_CV, ids_CK))


def _bucketed(log_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of these tokens, and behind them that of the rest, [C, K + 1]."""
    rest_C1 = log_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_CV.gather(-1, ids_CK), rest_C1], -1)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, Objective], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "top_k": top_k,
}
"""Of log-probabilities [C, V] float32, of the teacher and of the student, the divergence of
each token [C]."""


@dataclass(frozen=True)
class Head:
    """A language model's last linear layer, and the soft cap of its logits if it has one."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """That of a causal language model; tied or not, it is the tensor that the model uses."""
        linear: Any = model.get_output_embeddings()
        softcap = getattr(model.config, "final_logit_softcapping", None)
        return cls(linear.weight, linear.bias, softcap)

    def to(self, dtype: torch.dtype) -> Head:
        """In another dtype, outside any graph."""
        bias_V = None if self.bias_V is None else self.bias_V.detach().to(dtype)
        return Head(self.weight_VD.detach().to(dtype), bias_V, self.softcap)

    def raw(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Logits [C, V] float32 before the cap."""
        hidden_CD = hidden_CD.to(self.weight_VD.dtype)
        return functional.linear(hidden_CD, self.weight_VD, self.bias_V).float()

    def capped(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """What the model makes of them."""
        if self.softcap is None:
            return logits_CV
        return self.softcap * torch.tanh(logits_CV / self.softcap)

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Logits [C, V] float32 as the model gives them."""
        return self.capped(self.raw(hidden_CD))


TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""Of the student's logits [C, V] float32 and the place of the chunk among the T tokens, the
loss of each token [C]."""


def text_loss(targets_T: torch.Tensor) -> TokenLoss:
    """Negative log-likelihood of the tokens that follow."""

    def loss(logits_CV: torch.Tensor, at: slice) -> torch.Tensor:
        return functional.cross_entropy(logits_CV, targets_T[at], reduction="none")

    return loss


def teacher_loss(hidden_TE: torch.Tensor, head: Head, objective: Objective) -> TokenLoss:
    """Divergence from a teacher, whose logits too are only there for a chunk.

    Args:
        hidden_TE: what the teacher's head reads, of any width E.
        head: the teacher's. Of two vocabularies, where one is padded, the common part counts.
    """
    # Once, and not once a chunk.
    head = head.to(hidden_TE.dtype)
    tau = objective.temperature

    def loss(logits_CV: torch.Tensor, at: slice) -> torch.Tensor:
        with torch.no_grad():
            teacher_CV = head.logits(hidden_TE[at])
            common = min(teacher_CV.shape[-1], logits_CV.shape[-1])
            log_p_CV = torch.log_softmax(teacher_CV[:, :common] / tau, -1)
            del teacher_CV
        log_q_CV = torch.log_softmax(logits_CV[:, :common] / tau, -1)
        return tau**2 * LOSSES[objective.loss](log_p_CV, log_q_CV, objective)

    return loss


def sampled_loss(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> TokenLoss:
    """Cross-entropy to a teacher of which only drawn tokens are known; its gradient is that of
    forward KL in expectation (Anshumann et al. 2025, sparse logit sampling).

    Args:
        ids_TK: tokens that were drawn from the teacher; any token where the weight is 0.
        weights_TK: how often each was drawn, over the number of draws.
    """

    def loss(logits_CV: torch.Tensor, at: slice) -> torch.Tensor:
        log_q_CV = torch.log_softmax(logits_CV, -1)
        return -torch.linalg.vecdot(weights_TK[at].float(), log_q_CV.gather(-1, ids_TK[at].long()))

    return loss


def mixed(divergence: TokenLoss, text: TokenLoss, share: float) -> TokenLoss:
    """Both, the text's with this share; what has none is not computed."""
    if share in (0, 1):
        return text if share else divergence
    return lambda logits_CV, at: (
        (1 - share) * divergence(logits_CV, at) + share * text(logits_CV, at)
    )


def fused_loss(
    hidden_TD: torch.Tensor, head: Head, token_loss: TokenLoss, chunk: int = CHUNK
) -> torch.Tensor:
    """Sum of a loss over tokens, differentiable once in the hidden states and in the head.

    A chunk's logits are made, judged and turned into gradients before the next one's: neither
    logits nor probabilities of T x V elements are ever made. Matrix products are in autocast's
    dtype where it is on, everything behind them in float32.

    Args:
        hidden_TD: what the student's head reads.
        head: the student's.
        chunk: tokens at once.

    Returns:
        float32 [].
    """
    device = hidden_TD.device.type
    dtype = hidden_TD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    grad = torch.is_grad_enabled()
    return _Fused.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head.weight_VD, head.bias_V, head.softcap, token_loss, chunk, dtype, grad
    )


class _Fused(torch.autograd.Function):
    """The gradients are made on the way forward (Hsu et al. 2024, Liger Kernel)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        softcap: float | None,
        token_loss: TokenLoss,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> torch.Tensor:
        wanted = [
            torch.zeros_like(value, dtype=torch.float32)
            if value is not None and needed and grad
            else None
            for value, needed in zip(
                (hidden_TD, weight_VD, bias_V), ctx.needs_input_grad[:3], strict=True
            )
        ]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            head = Head(weight_VD, bias_V, softcap).to(dtype)
            total = hidden_TD.new_zeros((), dtype=torch.float32)
            for start in range(0, len(hidden_TD), chunk):
                at = slice(start, min(start + chunk, len(hidden_TD)))
                total += _chunk(hidden_TD[at].to(dtype), head, token_loss, at, wanted)
        ctx.grads = wanted
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of a fused loss are given once and then forgotten")
        dtypes = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
        scaled = [
            None if value is None else value.mul_(grad_output).to(dtype)
            for value, dtype in zip(grads, dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _chunk(
    hidden_CD: torch.Tensor,
    head: Head,
    token_loss: TokenLoss,
    at: slice,
    wanted: list[torch.Tensor | None],
) -> torch.Tensor:
    """Loss of a chunk, []; its gradients are added to those that are wanted."""
    grad_hidden_TD, grad_weight_VD, grad_bias_V = wanted
    logits_CV = head.raw(hidden_CD)
    if all(each is None for each in wanted):
        return token_loss(head.capped(logits_CV), at).sum()
    with torch.enable_grad():
        logits_CV.requires_grad_()
        loss = token_loss(head.capped(logits_CV), at).sum()
        (grad_CV,) = torch.autograd.grad(loss, logits_CV)
    if grad_bias_V is not None:
        grad_bias_V += grad_CV.sum(0)
    grad_CV = grad_CV.to(hidden_CD.dtype)
    if grad_hidden_TD is not None:
        grad_hidden_TD[at] = (grad_CV @ head.weight_VD).float()
    if grad_weight_VD is not None and grad_CV.dtype == torch.float32:
        grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
    elif grad_weight_VD is not None:
        grad_weight_VD += grad_CV.T @ hidden_CD
    return loss.detach()


def cosine_loss(
    student: torch.Tensor, teacher: torch.Tensor, projection: nn.Module | None = None
) -> torch.Tensor:
    """Sum over tokens of 1 - cosine between two hidden states.

    Args:
        student: [T, D].
        teacher: [T, E].
        projection: from D to E, where they differ.
    """
    if projection is not None:
        student = projection(student)
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()
