"""Run by a test in a bare process: loads an export as remote code, generates, saves it again.

Usage: python load_alone.py FOLDER AGAIN. Prints one JSON object.
"""

import importlib.abc
import json
import os
import sys


class Blocker(importlib.abc.MetaPathFinder):
    """Makes this project and Megatron impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dattn_mcore", "megatron", "tools"):
            raise ImportError(f"{name} is blocked in this process")
        return None


def main(folder: str, again: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import torch
    from PIL import Image
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    torch.set_num_threads(1)
    remote = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **remote)
    processor = AutoProcessor.from_pretrained(folder, **remote)
    model = AutoModelForImageTextToText.from_pretrained(folder, **remote).eval()
    other = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
    chats = [
        [{"role": "user", "content": "<image>\nWhich digit is in the top-left cell?"}],
        [{"role": "user", "content": "<image> and <image>?"}],
        [{"role": "user", "content": "Hello"}],
    ]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    sizes = ((28, 28), (90, 30), (30, 70))
    images = [Image.new("RGB", size, (i * 80, 40, 90)) for i, size in enumerate(sizes)]
    counts = [1, 2, 0]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}

    def answer(inputs, model=model, **changes):
        out = model.generate(**inputs, **settings, **changes)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    alone, first = [], 0
    for text, count in zip(texts, counts, strict=True):
        inputs = processor(
            text=text, images=images[first : first + count] or None, return_tensors="pt"
        )
        first += count
        alone += answer(inputs)
    # The ways of transformers' documentation: a list of parts, one call for text and images.
    parts = [
        {"type": "image", "image": images[0]},
        {"type": "text", "text": chats[0][0]["content"]},
    ]
    parts[1]["text"] = parts[1]["text"].removeprefix("<image>\n")
    form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    in_parts = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, **form
    )
    # A user who changed the model saves it; the code comes along.
    model.save_pretrained(again)
    processor.save_pretrained(again)
    saved = AutoModelForImageTextToText.from_pretrained(again, **remote).eval()
    loaded = AutoProcessor.from_pretrained(again, **remote)
    inputs = loaded(text=texts, images=images, padding=True, return_tensors="pt")
    held = model.make_image_cache()
    kept = [answer(batch, image_cache=held) for _ in range(2)]
    result = {
        "kept": kept,
        "held": [held.misses, held.hits],
        "model_type": config.model_type,
        "class": type(model).__module__,
        "image_processor": type(processor.image_processor).__module__,
        "tiles": len(batch["pixel_values"]),
        "grids": batch["image_grids"].tolist() if "image_grids" in batch else None,
        "stop": model.generation_config.eos_token_id,
        "cached": answer(batch),
        "uncached": answer(batch, use_cache=False),
        "causal_lm": answer(batch, other),
        "alone": alone,
        "in_parts": answer(in_parts),
        "again": answer(inputs, saved),
        "again_files": sorted(os.listdir(again)),
        "foreign": sorted(n for n in sys.modules if n.startswith(("dattn_mcore", "megatron"))),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
