"""The exported tokenizer and chat template give the trainer's ids."""

import json
from dataclasses import replace

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoTokenizer

from dattn_mcore.architectures import language_model
from dattn_mcore.config.schema import DataConfig
from dattn_mcore.data.templates import TextRun, encode_conversation, stop_id
from dattn_mcore.data.tiles import POLICIES
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.errors import CheckpointError
from dattn_mcore.hf import DattnProcessor, register
from tests.unit.convert.convert_helpers import TEXTS, make_checkpoint, make_tokenizer, small_config
from tests.unit.convert.raw_models import make_llm, make_tower, raw_config
from tests.unit.data.test_data_chat_families import make_byte_level
from tools.checkpoint_convert import mcore_to_hf
from tools.checkpoint_convert.hf_to_mcore import convert_parts, image_settings
from tools.checkpoint_convert.mcore_to_hf import ExportOptions
from tools.checkpoint_convert.tokenizers_out import PROBES, TURNS, from_sentencepiece, messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    register()  # exports are opened here without their own code
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_becomes_an_equal_fast_tokenizer(tmp_path, kind, fallback, prefix):
    """All kinds of models give the ids of the trainer's literal encoding, on any text."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        model_type=kind,
        vocab_size=400 if fallback else 90,
        hard_vocab_limit=False,
        byte_fallback=fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name="nmt_nfkc" if prefix else "identity",
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["\n"],
        pad_id=3,
        minloglevel=2,
    )
    ours, theirs = load_tokenizer(tmp_path / "m.model"), from_sentencepiece(tmp_path / "m.model")
    for text in (*PROBES, *TEXTS, "top  right\n\n 4,0"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        if fallback and not prefix:
            assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("template", ["plain", "mistral", "gemma"])
def test_chat_template_gives_the_templates_ids(tmp_path, tokenizer, template):
    """Loaded from the export: conversations as strings and as lists of parts."""
    make_checkpoint(tmp_path / "a", small_config(tokenizer, template=template))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    processor = DattnProcessor.from_pretrained(tmp_path / "hf")
    image_id = processor.image_token_id
    ours = load_tokenizer(tokenizer)
    conversations = [t for t in TURNS if template != "plain" or len(t) <= 2]
    for turns, system in [(t, s) for t in conversations for s in ("", " Be\nshort. ")]:
        runs = encode_conversation(ours, template, turns, system)
        expected = [i for r in runs for i in (r.ids if isinstance(r, TextRun) else (image_id,))]
        count = sum(turn.count("<image>") for turn in turns)
        images = [Image.new("RGB", (40, 30), (200, 10, 10))] * count or None
        text = processor.apply_chat_template(messages(turns, system))
        inputs = processor(text=text, images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == expected
        if count:
            assert inputs["pixel_values"].shape == (count, 3, 28, 28)
    parts = [{"type": "image"}, {"type": "text", "text": "What is here?"}]
    assert processor.apply_chat_template(
        [{"role": "user", "content": parts}]
    ) == processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat is here?"}])


def test_batches_are_padded_on_the_left(tmp_path, tokenizer):
    """The processor pads where generation needs it."""
    make_checkpoint(tmp_path / "a", small_config(tokenizer))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    processor = DattnProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(text=["<s>[INST] a b c d[/INST]", "<s>"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][1].tolist()[-2:] == [0, 1]
    assert "pixel_values" not in inputs


def test_labels_are_masked_where_nothing_predicts_them(tmp_path, tokenizer):
    """Images, padding and each sample's first token; a trainer that counts the rest is right."""
    make_checkpoint(tmp_path / "a", small_config(tokenizer))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    processor = DattnProcessor.from_pretrained(tmp_path / "hf")
    texts = ["<s>[INST] a <image> b[/INST]", "<s>[INST] a b c d e f g[/INST] h</s>"]
    images = [Image.new("RGB", (40, 30))]
    form = {"padding": True, "return_tensors": "pt", "return_labels": True}
    inputs = processor(text=texts, images=images, **form)
    ids, labels = inputs["input_ids"], inputs["labels"]
    live = inputs["attention_mask"].bool() & (ids != processor.image_token_id)
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    assert [row[alive].tolist() for row, alive in zip(kept, live, strict=True)] == [
        [False] + [True] * (int(alive.sum()) - 1) for alive in live
    ]
    assert not (kept & ~live).any()
    assert "labels" not in processor(text=texts[1], return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        processor(text=texts[1], return_labels=True)


def test_hugging_face_tokenizer_folder(tmp_path, tokenizer):
    """A model trained with a Hugging Face tokenizer exports that tokenizer plus <image>."""
    fast = from_sentencepiece(tokenizer)
    fast.save_pretrained(tmp_path / "tok")
    make_checkpoint(tmp_path / "a", small_config(tmp_path / "tok"))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(exported) == len(fast) + 1
    assert exported.encode("Where is it?") == fast.encode("Where is it?")


def test_a_converted_model_has_its_own_tokenizer_where_none_is_named(tmp_path, tokenizer):
    """The embedded task's, which is the default of the setting, is not the language model's."""
    fast = from_sentencepiece(tokenizer)
    config = raw_config("mistral", "siglip", select_layer=-1)
    make_llm(tmp_path / "llm", config)
    fast.save_pretrained(tmp_path / "llm")
    make_tower(tmp_path / "vision", config)
    for name, given in (("default", DataConfig().tokenizer), ("named", str(tokenizer))):
        data = replace(config.data, tokenizer=given)
        out = tmp_path / name
        convert_parts(tmp_path / "llm", tmp_path / "vision", replace(config, data=data), out)
        mcore_to_hf.convert(out, tmp_path / f"{name}-hf")
        exported = AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf")
        assert exported.encode("Where is it?") == fast.encode("Where is it?")
    # A language model without one: the message names its folder, not a file nobody named.
    for file in (tmp_path / "llm").glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        mcore_to_hf.convert(tmp_path / "default", tmp_path / "none-hf")
    assert f"'{tmp_path / 'llm'}'" in str(caught.value) and "--tokenizer" in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_image_processor_follows_the_policy(tmp_path, tokenizer, policy):
    """Exported pixels equal the trainer's tiles to two grey levels (its resize is torch's)."""
    from tests.unit.data.folder_loader import FolderLoader

    config = small_config(tokenizer)
    grids = ((1, 2), (3, 1))
    config = replace(config, data=replace(config.data, image_policy=policy, anyres_grids=grids))
    make_checkpoint(tmp_path / "a", config)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    register()
    processor = DattnProcessor.from_pretrained(tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 9, 3, generator=generator)
    images = [
        Image.fromarray((noise * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
        for size in ((90, 60), (40, 70))
    ]
    for name, image in zip("xy", images, strict=True):
        image.save(tmp_path / f"{name}.png")
    loader = FolderLoader(tmp_path, size=28, policy=policy, grids=grids, backend="pillow")
    tiles = loader.load([("x", "x.png"), ("y", "y.png")]).float()
    found = processor.image_processor(images, return_tensors="pt")
    pixels = found["pixel_values"]
    assert pixels.shape == tiles.shape and len(tiles) == (7 if "anyres" in policy else 2)
    assert (((pixels * 0.5 + 0.5) * 255) - tiles).abs().max() <= 2.01
    if "anyres" in policy:
        assert found["image_grids"].tolist() == [[3, 1], [1, 2]]
    assert ("image_grids" in found) == ("anyres" in policy)
    back = image_settings(tmp_path / "hf")
    assert back.image_policy == policy
    if "anyres" in policy:
        assert back.anyres_grids == grids


def test_a_tokenizer_without_the_templates_tokens(tmp_path, tokenizer):
    """One clear line, and nothing left behind."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )
    make_checkpoint(tmp_path / "a", small_config(tmp_path / "m.model"))
    with pytest.raises(CheckpointError, match=r"no token '\[INST\]'"):
        mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf", ExportOptions())
    assert sorted(p.name for p in tmp_path.iterdir() if "hf" in p.name) == []


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "ministral3"])
def test_a_byte_level_tokenizer_is_exported_with_its_family(tmp_path, family):
    """Some of them have no first token: neither the configuration nor a prompt gets one."""
    template = language_model(family).chat.name
    folder = make_byte_level(tmp_path / "tokenizer", template)
    make_checkpoint(tmp_path / "a", small_config(folder, family, vocab_size=330))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf", ExportOptions(check=True))
    register()
    processor = DattnProcessor.from_pretrained(tmp_path / "hf")
    ours = load_tokenizer(folder)
    runs = encode_conversation(ours, template, ["<image>\nWhich digit?"])
    image = processor.image_token_id
    expected = [i for r in runs for i in (r.ids if isinstance(r, TextRun) else (image,))]
    text = processor.apply_chat_template(messages(["<image>\nWhich digit?"]))
    inputs = processor(text=text, images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["text_config"]["bos_token_id"] == (ours.bos_id if ours.has_bos else None)
    stops = json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"]
    assert stop_id(ours, template) in stops
