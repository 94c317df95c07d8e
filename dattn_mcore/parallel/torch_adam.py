"""Fixes for resuming Megatron-Core's distributed optimizer with PyTorch's own Adam.

With Transformer Engine or Apex installed Megatron-Core keeps Adam's step count in the parameter
group and none of this applies. With PyTorch's Adam, megatron-core 0.16.1 to 0.19.2 save and
load the state wrongly in these places (each has a test in tests/distributed/test_resume.py, and
tests/megatron fails once a release does without):

1. a rank without trainable parameters (frozen language model, last pipeline stage) has no state
   to read the step from, and `state_dict` fails;
2. `sharded_state_dict(is_loading=True)` on a fresh optimizer needs state that does not exist yet;
3. every key of PyTorch's state, `step` included, is copied from loaded tensors that lack it;
4. all parameters end up sharing ONE `step` tensor, so that Adam's bias correction counts each
   parameter as a step, and the loss is wrong without a word from the second step on.
"""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.parallel.fewer_passes import adam_in_one_pass

_installed = False


def adam_in_use() -> tuple[str, str]:
    """Whose Adam Megatron-Core takes, and why, in words."""
    from megatron.core.optimizer import Adam

    package = Adam.__module__.split(".")[0]
    if package == "transformer_engine":
        return "Transformer Engine's fused Adam", "it is installed"
    if package == "apex":
        return "Apex's fused Adam", "Apex is installed, Transformer Engine's cannot be used"
    return "PyTorch's AdamW", "neither Transformer Engine's nor Apex's fused Adam can be used"


def install() -> None:
    """Applies the fixes once per process; does nothing where Apex or Transformer Engine is."""
    global _installed
    from megatron.core.optimizer import distrib_optimizer

    if _installed or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    _installed = True
    cls = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    sharded_state_dict = cls.sharded_state_dict
    get_states = cls._get_main_param_and_optimizer_states

    def mended_state_dict(self: Any) -> dict[str, Any]:
        if self.is_stub_optimizer or self.optimizer.state:
            return state_dict(self)
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"step": 0.0}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        return {"optimizer": {"param_groups": groups}}

    def mended_load_state_dict(self: Any, loaded: dict[str, Any]) -> None:
        load_state_dict(self, loaded)
        adam_in_one_pass(self.optimizer)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].detach().clone()

    def mended_sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_loading = kwargs.get("is_loading", args[1] if len(args) > 1 else False)
        if is_loading and not self.is_stub_optimizer and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, *args, **kwargs)

    def mended_get_states(self: Any, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {k: v for k, v in get_states(self, model_param).items() if k != "step"}

    def mended_set_states(
        self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        for key, tensor in mended_get_states(self, model_param).items():
            tensor.copy_(tensors[key])

    cls.state_dict = mended_state_dict
    cls.load_state_dict = mended_load_state_dict
    cls.sharded_state_dict = mended_sharded_state_dict
    cls._get_main_param_and_optimizer_states = mended_get_states
    cls._set_main_param_and_optimizer_states = mended_set_states
