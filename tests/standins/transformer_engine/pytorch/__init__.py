"""Linear, norms and attention with Transformer Engine's constructors, in plain PyTorch."""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel

from . import distributed, fp8, ops  # noqa: F401
from .fp8 import fp8_autocast  # noqa: F401


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device=None,
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.tp_size, self.group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.ub_name = ub_name if ub_overlap_ag or ub_overlap_rs else None
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        self.bias = (
            torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        )
        for parameter, dim in (
            (self.weight, 0 if parallel_mode == "column" else 1),
            (self.bias, 0),
        ):
            if parameter is None:
                continue
            split = parallel_mode == "column" or parameter is self.weight
            parameter.tensor_model_parallel = split
            parameter.partition_dim, parameter.partition_stride = (dim if split else -1), 1
            if not split:
                parameter.sequence_parallel = sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = tensor_parallel.gather_from_sequence_parallel_region(inp, group=self.group)
            elif self.tp_size > 1:
                inp = tensor_parallel.copy_to_tensor_model_parallel_region(inp, group=self.group)
        out = inp @ self.weight.t()
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                    out, group=self.group
                )
            else:
                out = tensor_parallel.reduce_from_tensor_model_parallel_region(
                    out, group=self.group
                )
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class LayerNormLinear(Linear):
    pass


class GroupedLinear(Linear):
    pass


class _Norm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device=None,
    ):
        super().__init__()
        self.size, self.eps, self.zero_centered_gamma = hidden_size, eps, zero_centered_gamma
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def gamma(self):
        weight = self.weight.float()
        return weight + 1 if self.zero_centered_gamma else weight


class RMSNorm(_Norm):
    def forward(self, x):
        return F.rms_norm(x.float(), (self.size,), self.gamma(), self.eps).to(x.dtype)


class LayerNorm(_Norm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = self.weight.sequence_parallel

    def forward(self, x):
        bias = self.bias.float()
        return F.layer_norm(x.float(), (self.size,), self.gamma(), bias, self.eps).to(x.dtype)


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        self.mask, self.scale = attn_mask_type, softmax_scale

    def forward(
        self, query, key, value, attention_mask=None, qkv_format="sbhd", attn_mask_type=None, **rest
    ):
        assert qkv_format == "sbhd" and (attn_mask_type or self.mask) == "no_mask"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
