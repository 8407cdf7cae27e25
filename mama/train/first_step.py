"""First-step checks: frozen weights are unchanged, every trainable parameter received a gradient."""

from __future__ import annotations

from mama.errors import TrainingError
from mama.run.model_state import digest_of, first_difference
from mama.runtime.collectives import rank
from mama.train.deepspeed_engine import load_deepspeed
from mama.train.zero_state import DeepSpeedEngine


def digests_of_engine(engine: DeepSpeedEngine) -> dict[str, str]:
    """Return `model_state.digests` of the engine's model under any ZeRO stage; every rank must call it."""
    gathered = load_deepspeed().zero.GatheredParameters
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with gathered([parameter], enabled=hasattr(parameter, "ds_id")):
                if rank() == 0:
                    found[name] = digest_of(parameter)
    return found


class FirstStep:
    """Watches the first step after a start, from its creation to `check`; every rank must make one."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.before = digests_of_engine(engine)
        self.waiting = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        self.hooks = [
            p.register_hook(lambda _, name=name: self.waiting.discard(name))
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        ]

    def check(self) -> None:
        """Raise `TrainingError` with the names of tensors that failed; to be called once, after the step."""
        for hook in self.hooks:
            hook.remove()
        if self.waiting:
            raise TrainingError(f"no gradient reached {', '.join(sorted(self.waiting))}")
        if name := first_difference(self.before, digests_of_engine(self.engine)):
            raise TrainingError(f"the frozen tensor {name} changed in the first step")
