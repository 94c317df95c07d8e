"""D-Attn in float64, one sample at a time, row by row, written from section 2 of the design.

Shares no code with the package: it reads weights by name and loops over query rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_logits(
    weights: dict[str, Tensor], config, tokens: list[int], features: Tensor, grids=None
) -> Tensor:
    """Logits [text rows, vocab] of one sample.

    Args:
        weights: state dict of the model.
        config: DattnConfig.
        tokens: one sample's input ids, with one placeholder per image.
        features: tower features [tiles, rows, width] of the sample.
        grids: columns and rows of each image's canvas; None: one tile an image.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    text = config.text_config
    gemma = is_gemma(text)
    visual_rows = project(w, config, features.double(), grids or [(0, 0)] * len(features))
    embedding = w["model.language_model.embed_tokens.weight"]
    scale = math.sqrt(text.hidden_size) if gemma else 1.0

    # Reading order: (is_visual, image number, row)
    order, image = [], 0
    for token in tokens:
        if token == config.image_token_id:
            order += [(True, image, row) for row in visual_rows[image]]
            image += 1
        else:
            order.append((False, image, embedding[token] * scale))
    hidden = torch.stack([row for _, _, row in order])
    for layer in range(text.num_hidden_layers):
        hidden = decoder_layer(w, config, layer, order, hidden)
    is_text = torch.tensor([not visual for visual, _, _ in order])
    out = rms(hidden[is_text], w["model.language_model.norm.weight"], text.rms_norm_eps, gemma)
    logits = out @ w["lm_head.weight"].T
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def is_gemma(text) -> bool:
    """Norms by 1 + weight, before and after each branch; embeddings times the root of their width."""
    return text.model_type in ("gemma2", "gemma3_text")


def rms(x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y * (1 + weight) if centred else y * weight


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def project(w: dict[str, Tensor], config, features: Tensor, grids) -> list[Tensor]:
    """Rows of each image, each row at its place in a view of its own size."""
    p = "model.multi_modal_projector."
    eps = config.projector_norm_eps
    x = gelu(features @ w[p + "linear_1.weight"].T + w[p + "linear_1.bias"])
    x = x @ w[p + "linear_2.weight"].T + w[p + "linear_2.bias"]
    x = rms(x, w[p + "norm.weight"], eps, False)
    side, half = config.grid[0], x.shape[-1] // 2

    def embedding(axis: str, place: float) -> Tensor:
        q = p + f"{axis}_position."
        angles = [place * 10000 ** (-k / half) for k in range(half)]
        s = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]).double()
        y = gelu(w[q + "fc1.weight"] @ s + w[q + "fc1.bias"])
        y = w[q + "fc2.weight"] @ y + w[q + "fc2.bias"]
        return y / torch.sqrt((y * y).mean() + eps)

    images, first = [], 0
    for columns, rows in grids:
        image = []
        for wide, high in [(1, 1)] + [(columns, rows)] * (columns > 0):
            for row in range(high * side):
                for column in range(wide * side):
                    tile = first + row // side * wide + column // side
                    y = x[tile, row % side * side + column % side]
                    if config.visual_positions:
                        # 0 .. entries - 1 whatever the size of the view
                        y = y + embedding("row", row * (side - 1) / (high * side - 1))
                        y = y + embedding("column", column * (side - 1) / (wide * side - 1))
                    image.append(y)
            first += wide * high
        y = rms(torch.stack(image), w[p + "output_norm.weight"], eps, False)
        gemma = is_gemma(config.text_config)
        images.append(y * math.sqrt(y.shape[-1]) if gemma else y)
    return images


def rotate(x: Tensor, position: int, rope: dict) -> Tensor:
    """Rotary embedding of one head vector [d], half-split pairs."""
    half = x.shape[-1] // 2
    angle = torch.tensor([position * f for f in frequencies(rope, half)]).double()
    a, b = x[:half], x[half:]
    turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat(turned, dim=-1) * rope.get("attention_factor", 1.0)


def frequencies(rope: dict, half: int) -> list[float]:
    """Angle a position of each pair; YaRN blends by the logarithm of the turns (not truncated)."""
    plain = [rope["rope_theta"] ** (-i / half) for i in range(half)]
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    if rope["rope_type"] == "llama3":
        return [llama3_frequency(rope, frequency) for frequency in plain]
    fast, slow = math.log(rope["beta_fast"]), math.log(rope["beta_slow"])
    found = []
    for frequency in plain:
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        divided = min(max((fast - math.log(turns)) / (fast - slow), 0.0), 1.0)
        found.append(frequency * (divided / rope["factor"] + 1 - divided))
    return found


def llama3_frequency(rope: dict, frequency: float) -> float:
    """Slow ones are divided, fast ones stay, those between are blended by their wave length."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / rope["factor"])


def query_scale(rope: dict, position: int) -> float:
    """Of a rotated query at a position."""
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return 1.0
    return 1 + beta * math.log(1 + position // rope["original_max_position_embeddings"])


def decoder_layer(w: dict[str, Tensor], config, layer: int, order: list, x: Tensor) -> Tensor:
    text = config.text_config
    gemma, eps = is_gemma(text), text.rms_norm_eps
    p = f"model.language_model.layers.{layer}."

    def norm(name: str, y: Tensor) -> Tensor:
        if p + name + ".weight" not in w:
            return y
        return rms(y, w[p + name + ".weight"], eps, gemma)

    behind = p + "post_feedforward_layernorm.weight" in w  # attention and MLP, or before the MLP
    branch = attention(w, config, layer, order, norm("input_layernorm", x))
    x = x + (norm("post_attention_layernorm", branch) if behind else branch)
    y = norm("pre_feedforward_layernorm" if behind else "post_attention_layernorm", x)
    gate = y @ w[p + "mlp.gate_proj.weight"].T
    if gemma:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate = 0.5 * gate * (1 + torch.tanh(inner))
    else:
        gate = gate / (1 + torch.exp(-gate))
    y = (gate * (y @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return x + norm("post_feedforward_layernorm", y)


def attention(w: dict[str, Tensor], config, layer: int, order: list, x: Tensor) -> Tensor:
    text = config.text_config
    p = f"model.language_model.layers.{layer}.self_attn."
    heads, groups, d = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    q, k, v = (
        (x @ w[p + f"{name}.weight"].T + w.get(p + f"{name}.bias", 0.0)).view(-1, count, d)
        for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
    )
    if p + "q_norm.weight" in w:  # before any rotation, of each head or of all of them
        q, k = (
            rms(
                y.reshape(len(y), -1, weight.numel()), weight, text.rms_norm_eps, is_gemma(text)
            ).view_as(y)
            for y, weight in ((q, w[p + "q_norm.weight"]), (k, w[p + "k_norm.weight"]))
        )
    scale = (getattr(text, "query_pre_attn_scalar", None) or d) ** -0.5
    cap = getattr(text, "attn_logit_softcapping", None)
    types = getattr(text, "layer_types", None)
    windowed = types is None or types[layer] == "sliding_attention"
    window = getattr(text, "sliding_window", None) if windowed else None
    rope_parameters = text.rope_parameters
    if "rope_type" not in rope_parameters:  # of each kind of layer
        rope_parameters = rope_parameters[types[layer]]
    rotates = getattr(text, "no_rope_layers", None)  # 1: has rotary positions, in spite of its name
    turned = rotates is None or bool(rotates[layer])
    rope = config.t2v_position == "rope"

    text_index, visual_index = {}, {}
    for place, (visual, _, _) in enumerate(order):
        (visual_index if visual else text_index)[place] = len(
            visual_index if visual else text_index
        )

    def logit(head: int, i: int, j: int) -> float | None:
        """Logit of query row i on key row j; None if hidden."""
        group = head // (heads // groups)
        a, b = q[i, head], k[j, group]
        i_visual, j_visual = order[i][0], order[j][0]
        if rope:
            at = (i, j)
        elif i_visual == j_visual:
            table = visual_index if i_visual else text_index
            at = (table[i], table[j])
        else:
            at = None
        if at is not None:
            if window is not None and at[0] - at[1] >= window:
                return None
            if turned:
                a = rotate(a, at[0], rope_parameters) * query_scale(rope_parameters, at[0])
                b = rotate(b, at[1], rope_parameters)
        value = scale * (a @ b)
        return value if cap is None else cap * torch.tanh(value / cap)

    def softmax_over(head: int, i: int, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Output [d] and log-sum-exp of query i over `keys`."""
        group = head // (heads // groups)
        seen = [(j, logit(head, i, j)) for j in keys]
        seen = [(j, value) for j, value in seen if value is not None]
        if not seen:
            return torch.zeros(d).double(), torch.tensor(-math.inf).double()
        values = torch.stack([value for _, value in seen])
        weights = torch.exp(values - values.max())
        out = (weights / weights.sum()) @ torch.stack([v[j, group] for j, _ in seen])
        return out, torch.logsumexp(values, 0)

    rows = []
    for i, (i_visual, _, _) in enumerate(order):
        before = range(i + 1)
        visual_keys = [j for j in before if order[j][0]]
        text_keys = [j for j in before if not order[j][0]]
        outs = []
        for head in range(heads):
            if i_visual and config.v2v == "diagonal":
                outs.append(v[i, head // (heads // groups)])
                continue
            if i_visual:
                keys = visual_keys + (text_keys if rope else [])
                outs.append(softmax_over(head, i, keys)[0])
                continue
            cross, lse_v = softmax_over(head, i, visual_keys)
            own, lse_t = softmax_over(head, i, text_keys)
            if config.merge == "sum":
                outs.append(cross + own)
            else:
                alpha = torch.sigmoid(lse_v - lse_t)
                outs.append(alpha * cross + (1 - alpha) * own)
        rows.append(torch.cat(outs))
    return torch.stack(rows) @ w[p + "o_proj.weight"].T
