"""What a Hugging Face folder says besides its weights survives cut, training and export, and leads nowhere else."""
import json

import pytest
import torch
import transformers
import yaml

import checkpoint
import export
import prune
import train
from common import UserError, parse
from formats import huggingface, origin
from formats.model_card import model_card
from formats.tokenizer import open_tokenizer
from model import GPT, GPTConfig

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
MESSAGES = [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Ja."}]
GENERATION = {"eos_token_id": [2, 0], "pad_token_id": 3, "do_sample": True, "temperature": 0.6}
LICENSE = "Licence of Ours\n§ 1 \u2028 …\n"
HEAD = "---\r\nlanguage: en\r\nlicense: other\r\nlicense_name: \"ours\"\r\nlicense_link: https://a.b/c\r\n---\r\n"
CUT = ("--keep 0.75 --structure ffn --allocate uniform-strict --windows 4 --eval-windows 2 --block-size 32 "
       "--device cpu --dtype float32").split()
SHAPE = dict(vocab_size=256, block_size=64, d_model=64, head_dim=16, n_head=(4, 4), n_kv_head=(2, 2), d_ff=(64, 64))


def new_folder(folder):
    """A small chat model in bfloat16, as somebody may have downloaded it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).bfloat16()
    huggingface.save(folder, model, "llama", {**open_tokenizer("bytes").as_files(), "chat_template.jinja": CHAT})
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "README.md").write_bytes(HEAD.encode())
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (folder / "NOTICE").write_bytes(b"x" * (origin.LONGEST_FILE + 1))
    (folder / "other.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """The folder, and the run that trained its cut model, stopped once and resumed."""
    root = tmp_path_factory.mktemp("origin")
    folder = new_folder(root / "small chat")
    text = root / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    prune.main(parse(prune.Prune, ["--init", str(folder), *CUT, "--data", str(text), "--out", str(root / "cut")]))
    run = dict(init=str(root / "cut"), teacher=str(folder), plan="kd", data=str(text), steps=4, batch_tokens=128,
               micro_batch=4, block_size=32, eval_windows=1, save_every=2, device="cpu", out=str(root / "run"))
    setup, state = train.prepare(train.Train(**run))
    setup.folder.rewind(0)
    setup.folder.save(state, {})
    train.main(train.Train(**run), quiet=True)
    return root


def test_a_recovered_model_is_exported_as_its_source_was(recovered, capsys):
    out = recovered / "out"
    export.main(export.Export(str(recovered / "run"), str(out)))
    assert "bfloat16" in capsys.readouterr().out
    peer = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto")
    assert peer.dtype == torch.bfloat16 and peer.config.intermediate_size == 32
    assert (out / "model.safetensors").stat().st_size < 2.2 * peer.num_parameters()
    source, exported = (transformers.AutoTokenizer.from_pretrained(f) for f in (recovered / "small chat", out))
    for more in (False, True):
        assert source.apply_chat_template(MESSAGES, add_generation_prompt=more) == exported.apply_chat_template(
            MESSAGES, add_generation_prompt=more)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert {key: getattr(generation, key) for key in GENERATION} == GENERATION
    assert (out / "LICENSE").read_text(encoding="utf-8") == LICENSE and not (out / "NOTICE").exists()

    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "small chat", "license": "other", "license_name": "ours", "license_link": "https://a.b/c",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["nanoprune", "pruned", "conversational"]}
    assert "1. Cut to `0.75` of its parameters in blocks (structure `ffn`)" in text
    assert "2. Trained by plan `kd` on 512 tokens of `text.txt`, taught by `small chat` (`train.py`)" in text
    assert str(recovered) not in text
    again, about = checkpoint.load(out)
    assert about["origin"]["license_name"] == "ours" and about["origin"]["files"] == {"LICENSE": LICENSE}
    float32 = recovered / "float32"
    export.main(export.Export(str(recovered / "run"), str(float32), dtype="float32", unchecked=True))
    assert checkpoint.load(float32)[0].embed.weight.dtype == torch.float32


def test_a_gguf_has_the_template_and_the_license(recovered, tmp_path):
    gguf = pytest.importorskip("gguf")
    export.main(export.Export(str(recovered / "run"), str(tmp_path / "m.gguf"), "gguf", unchecked=True))
    values = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {"tokenizer.chat_template": CHAT, "general.license": "other", "general.base_model.0.name": "small chat",
                "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16), "tokenizer.ggml.padding_token_id": 3}
    assert {name: values.get(name) for name in expected} == expected


def test_a_gguf_in_8_bits_says_which_matrices_are_not(recovered, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    export.main(export.Export(str(recovered / "run"), str(tmp_path / "m.gguf"), "gguf", "q8_0"))
    assert "q8_0; the same in xllamacpp" in capsys.readouterr().out
    odd = GPT(GPTConfig(**SHAPE | dict(d_ff=(33, 64))))
    checkpoint.save(tmp_path / "odd.pt", odd, run={"tokenizer": "bytes"})
    export.main(export.Export(str(tmp_path / "odd.pt"), str(tmp_path / "odd.gguf"), "gguf", "q8_0"))
    said = "q8_0, with 1 matrices in f16, as 32 does not divide their rows (blocks.0.ffn.down.weight; cut with --mult"
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="--dtype q8_0 is a type of GGUF files, and --to hf writes none; give --to g"):
        export.main(export.Export(str(tmp_path / "odd.pt"), str(tmp_path / "odd"), "hf", "q8_0"))
    checkpoint.save(tmp_path / "odd.pt", GPT(GPTConfig(**SHAPE | dict(d_model=80))), run={"tokenizer": "bytes"})
    with pytest.raises(UserError, match="blocks of 32 weights, .* rows of 80 are no multiple; cut channels with"):
        export.main(export.Export(str(tmp_path / "odd.pt"), str(tmp_path / "narrow.gguf"), "gguf", "q8_0"))


def test_a_checkpoint_from_before_has_its_license(tmp_path):
    checkpoint.save(tmp_path / "m.pt", GPT(GPTConfig(**SHAPE)), license="mit",
                    run={"tokenizer": "bytes", "cut_from": "a/b", "recipe": {"keep": 0.5}})
    about = checkpoint.load(tmp_path / "m.pt", "meta")[1]
    assert (about["origin"]["license"], about["origin"]["dtype"]) == ("mit", None)
    assert origin.hand_on(about)["steps"] == [{"command": "prune.py", "keep": 0.5}]
    assert export.load(export.Export(str(tmp_path / "m.pt"), ""))[0].embed.weight.dtype == torch.float32


@pytest.mark.parametrize("changes, says", [
    ({"files": {"../LICENSE": "x"}}, "the file '../LICENSE'"),
    ({"files": {"config.json": "x"}}, "the file 'config.json'"),
    ({"files": {"LICENSE": b"x"}}, "the file 'LICENSE'"), ({"files": {"LICENSE": "x" * 2**19}}, "the file 'LICENSE'"),
    ({"files": ["LICENSE"]}, "the files"), ({"name": "a\n---\nb"}, "the name"), ({"license": 3}, "the license '3'"),
    ({"dtype": "int8"}, "the dtype 'int8'"), ({"params": True}, "'True' parameters"),
    ({"params": -5}, "'-5' parameters"), ({"files": {"LICENSE": "a\ud800"}}, "the file 'LICENSE'"),
    ({"more": 1}, "{'name'"),
    ({"steps": [1]}, "no list of settings"), ({"steps": [{"a": torch.ones(1)}]}, "no plain values"),
    ({"steps": [{"a": "x" * 2**17}]}, "steps of 131,0.. characters")])
def test_an_origin_that_somebody_sent_is_refused(changes, says, tmp_path):
    checkpoint.save(tmp_path / "m.pt", GPT(GPTConfig(**SHAPE)), run={"tokenizer": "bytes"},
                    origin={**origin.NOTHING, **changes})
    with pytest.raises(UserError, match=f"m.pt has .*{says}.* where it says what the model came from"):
        checkpoint.load(tmp_path / "m.pt")


def test_a_legal_text_is_no_link_to_a_private_file(tmp_path, capsys):
    (tmp_path / "private").write_text("secret")
    hub = tmp_path / "models--a--b" / "snapshots" / "123"
    for folder in (tmp_path / "sent", hub):
        folder.mkdir(parents=True)
        (folder / "LICENSE").symlink_to(tmp_path / "private")
        assert origin.read(folder, "m", None, None)["files"] == {}
        assert "LICENSE is no UTF-8 text of at most 262,144 bytes in its own folder" in capsys.readouterr().err
    blobs = hub.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "456").write_text("MIT")
    (hub / "NOTICE").symlink_to("../../blobs/456")
    (hub / "LICENSE.md").symlink_to("NOTICE")
    assert origin.read(hub, "m", None, None)["files"] == {"NOTICE": "MIT", "LICENSE.md": "MIT"}


def test_a_name_of_odd_characters_can_be_read_again(tmp_path):
    folder = tmp_path / "my\u00a0model\u200d\t\x1b"
    huggingface.save(folder, GPT(GPTConfig(**SHAPE)), "llama", open_tokenizer("bytes").as_files())
    model, about = checkpoint.load(folder)
    checkpoint.save(tmp_path / "m.pt", model, run={"tokenizer": "bytes"}, origin=origin.hand_on(about))
    assert checkpoint.load(tmp_path / "m.pt")[1]["origin"]["name"] == "my model  \\x1b"


def test_a_card_says_what_strangers_wrote_as_quotations_only():
    sly = "x\n---\nlicense: mit\n```\n<b>`"
    steps = [{"command": "prune.py", "data": [sly], "score": sly}, {"command": "train.py", "plan": sly, "done": sly}]
    text = model_card("m", GPTConfig(**SHAPE), {**origin.NOTHING, "name": sly, "license": sly, "steps": steps})
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == sly and yaml.safe_load(front)["base_model"] == sly
    wide = model_card("m", GPTConfig(**SHAPE), {**origin.NOTHING, "license": "\U0001d40c"})
    assert yaml.safe_load(wide.split("---\n")[1])["license"] == "\U0001d40c"
    fences = [line for line in body.splitlines() if line.strip().startswith("```")]
    assert len(fences) == 8 and not any(line.startswith(("---", "license:", "<b>")) for line in body.splitlines())
