"""Step 4a: train a model in a box of time, and say how well it foretells held-out text of each domain."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from traces.errors import InputError
from traces.reference.experts import NAME, fastest_activation, register_training_experts
from traces.reference.models import ReferenceModel, Training
from traces.reference.tokens import PackedTokens

_FINAL_RATE = 0.04
"""Share of the peak rate that is left at the end."""

_LOG_EVERY = 100
"""Steps; each entry waits for the device."""


def build_model(reference: ReferenceModel, vocabulary: int, device: torch.device) -> Any:
    """Return the model with its initial weights, in single precision.

    They are drawn on the CPU, so that the same seed gives the same weights on any device.
    """
    torch.manual_seed(reference.seed)
    config = transformers.AutoConfig.for_model(reference.architecture, **reference.configuration(vocabulary))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    # What every layer adds to the residual stream shrinks with depth, as in GPT-2, so that deep models train at this rate.
    shrink = (2 * reference.layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(shrink)
    return model.to(device)


def halve(model: Any) -> None:
    """Turn the parameters into bf16, and nothing else: rotary frequencies must stay in single precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def train(model: Any, reference: ReferenceModel, tokens: PackedTokens, until: float) -> dict[str, Any]:
    """Train `model`, which must be in single precision, in place until `time.monotonic` reads `until`; leave it in bf16.

    Returns what happened: ``tokens``, ``steps``, ``seconds``, ``tokens_per_second``, ``epochs`` of each domain begun,
    ``activation`` and the ``log``, whose columns are ``log_columns``.

    Raises `InputError` when a domain has too few tokens, when no time is left, or when the loss is no number any more.
    """
    settings = reference.training
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Updates are smaller than the steps between bf16 numbers: they add up in single precision.
    masters = [parameter.detach().clone() for parameter in parameters]
    halve(model)
    layers = _Layers(model)
    activation, how = fastest_activation(layers.width, settings.batch * settings.sequence * layers.top_k, device)
    register_training_experts(activation)
    _use_training_modules(model)
    optimizer = _optimizer(masters, settings)
    batches = _Batches(tokens, settings, reference.seed, device)
    model.train()
    started = time.monotonic()
    log: list[list[float]] = []
    step = 0
    while (share := _share_done(started, until, step, settings)) < 1:
        _set_rate(optimizer, settings, step, share)
        losses = _losses(model, layers, batches.next())
        (losses[0] + settings.balance * losses[1] + settings.router_z * losses[2]).backward()
        norm = _update(parameters, masters, optimizer)
        step += 1
        if step == 1 or step % _LOG_EVERY == 0:
            log.append(
                [step, round(time.monotonic() - started, 1), *(round(float(value.detach()), 4) for value in (*losses, norm))]
            )
            if not math.isfinite(log[-1][2]):
                raise InputError(f"{reference.name}: the loss is {log[-1][2]} at step {step}; lower training.peak_rate")
            print(f"step {step}: loss {log[-1][2]:.3f}, {log[-1][1]:.0f} s", flush=True)
    if step == 0:
        raise InputError(f"{reference.name}: no time is left to train; let training end later")
    _wait(device)
    seconds = time.monotonic() - started
    layers.close()
    _use_stock_modules(model)
    seen = step * settings.batch * settings.sequence
    return {
        "tokens": seen,
        "steps": step,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(seen / seconds),
        "epochs_begun": dict(batches.epochs),
        "activation": how,
        "log_columns": ["step", "seconds", "loss", "balance (1 is even)", "router z", "gradient norm"],
        "log": log,
    }


def held_out_loss(model: Any, reference: ReferenceModel, tokens: PackedTokens) -> dict[str, float]:
    """Return the mean loss in nats per token on sequences spread over each domain's held-out text."""
    length, device = reference.training.sequence, next(model.parameters()).device
    model.eval()
    losses = {}
    for domain in tokens.domains:
        windows = [
            segment[start : start + length + 1]
            for segment in tokens.held_out_segments(domain)
            for start in range(0, len(segment) - length, length)
        ]
        if not windows:
            raise InputError(f"{tokens.folder}: '{domain}' has no held-out segment of {length + 1} tokens; hold out more")
        windows = windows[:: -(-len(windows) // reference.training.held_out_sequences)]
        total = 0.0
        for start in range(0, len(windows), reference.training.batch):
            batch = torch.from_numpy(np.stack(windows[start : start + reference.training.batch]).astype(np.int64)).to(device)
            with torch.inference_mode():
                total += float(_text_loss(model, batch)) * len(batch)
        losses[domain] = round(total / len(windows), 4)
    return losses


class _Layers:
    """The model's MoE layers while it trains: their router logits and loads of the last forward pass."""

    def __init__(self, model: Any) -> None:
        self.blocks = [layer.mlp for layer in model.model.layers]
        self.experts = self.blocks[0].experts.num_experts
        self.top_k = self.blocks[0].gate.top_k
        self.width = self.blocks[0].experts.down_proj.shape[-1]
        self.logits: dict[int, torch.Tensor] = {}
        self._hooks = [block.gate.register_forward_hook(self._keep(at)) for at, block in enumerate(self.blocks)]

    def _keep(self, at: int) -> Any:
        def hook(_module: Any, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            self.logits[at] = outputs[0]

        return hook

    def balance(self) -> torch.Tensor:
        """Return the balancing loss, the mean of the layers' own.

        transformers' own function pools all layers, and so lets each of them collapse.
        """
        losses = []
        for at, block in enumerate(self.blocks):
            load = block.experts.tokens_per_expert.float()
            losses.append(self.experts * ((load / load.sum()) * self.logits[at].float().softmax(dim=-1).mean(dim=0)).sum())
        return torch.stack(losses).mean()

    def router_z(self) -> torch.Tensor:
        """Return the mean square of the routers' log partition functions."""
        return torch.stack([self.logits[at].float().logsumexp(dim=-1).square().mean() for at in self.logits]).mean()

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            del block.experts.tokens_per_expert


class _Batches:
    """Sequences of training text, the domains in turn, each domain's in a random order that begins anew at its end."""

    def __init__(self, tokens: PackedTokens, settings: Training, seed: int, device: torch.device) -> None:
        # int16 has room for a vocabulary of 32,768 and is what every device can index.
        self._text = {
            domain: torch.from_numpy(tokens.read(domain, "train").astype(np.int16)).to(device) for domain in tokens.domains
        }
        for domain, text in self._text.items():
            if len(text) <= 2 * settings.sequence:
                raise InputError(
                    f"{tokens.folder}: '{domain}' has {len(text)} tokens; train on above {2 * settings.sequence}"
                )
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        self._left: dict[str, list[int]] = {domain: [] for domain in self._text}
        self._turn = self._turns()
        self.epochs = dict.fromkeys(self._text, 0)
        """Times that each domain was begun."""

    def next(self) -> torch.Tensor:
        """Return [batch, sequence + 1] ids."""
        return torch.stack([self._sequence(next(self._turn)) for _ in range(self._settings.batch)]).long()

    def _turns(self) -> Iterator[str]:
        while True:
            yield from self._text

    def _sequence(self, domain: str) -> torch.Tensor:
        length, text = self._settings.sequence, self._text[domain]
        if not self._left[domain]:
            # Another offset each time, so that sequences begin elsewhere.
            offset = int(self._rng.integers(0, length))
            count = (len(text) - 1 - offset) // length
            self._left[domain] = [offset + int(number) * length for number in self._rng.permutation(count)]
            self.epochs[domain] += 1
        start = self._left[domain].pop()
        return text[start : start + length + 1]


def _losses(model: Any, layers: _Layers, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses of text, of balance and of the routers' scale."""
    return _text_loss(model, batch), layers.balance(), layers.router_z()


def _text_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].reshape(-1))


def _optimizer(masters: Sequence[torch.Tensor], settings: Training) -> torch.optim.AdamW:
    for master in masters:
        master.grad = torch.zeros_like(master)
    matrices = [master for master in masters if master.dim() > 1]
    vectors = [master for master in masters if master.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=True)


def _update(
    parameters: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], optimizer: torch.optim.AdamW
) -> torch.Tensor:
    """Move the masters by the parameters' gradients, and the parameters to the masters; return the gradients' norm."""
    torch._foreach_copy_([master.grad for master in masters], [parameter.grad for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
    optimizer.step()
    torch._foreach_copy_([parameter.data for parameter in parameters], list(masters))
    return norm


def _share_done(started: float, until: float, step: int, settings: Training) -> float:
    by_time = (time.monotonic() - started) / max(until - started, 1e-9)
    by_steps = step / settings.most_steps if settings.most_steps else 0.0
    return max(by_time, by_steps)


def _set_rate(optimizer: torch.optim.AdamW, settings: Training, step: int, share: float) -> None:
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = settings.peak_rate * warm * cosine


def _use_training_modules(model: Any) -> None:
    """Exchange experts and norms for equal ones that train faster."""
    model.set_experts_implementation(NAME)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_fused_norm, module)


def _use_stock_modules(model: Any) -> None:
    """Undo `_use_training_modules`: what is recorded is the model as transformers computes it."""
    model.set_experts_implementation("grouped_mm")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            del module.forward


def _fused_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden, (hidden.size(-1),), self.weight, self.variance_epsilon)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parameter_counts(model: Any, top_k: int) -> Mapping[str, int]:
    """Return how many parameters the model has, and how many work on one token."""
    every = sum(parameter.numel() for parameter in model.parameters())
    blocks = [layer.mlp.experts for layer in model.model.layers]
    routed = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return {"parameters": every, "active_parameters": every - routed + routed * top_k // blocks[0].num_experts}
