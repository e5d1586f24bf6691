"""The README.md of an exported model, as the hub shows it: what it was made of, how, what is known of it, and
how to load it.

    python export.py runs/recover-cut-0 --to hf folder     # writes one where the model has an origin

The names and settings come out of a checkpoint that somebody may have sent. So they are written as JSON
strings or between backticks, and begin no line. Not here: figures, which are the caller's text; how the
origin is kept (formats/origin.py).
"""
import json
from pathlib import Path

from formats.origin import NOTHING

PROJECT = "nanoprune"
# What prune.py's --budget counts, in words.
RESOURCES = {
    "params": "parameters in blocks",
    "flops": "FLOPs in blocks",
    "kv_bytes": "KV cache",
    "ms": "decode time",
}


def model_card(title, config, origin=NOTHING, dtype="float32", own_code=False, has_chat=False, figures=None):
    """The text of a README.md. `config` is the GPTConfig, `origin` as in formats/origin.py, `figures`
    Markdown or None. `own_code`: transformers loads the model with code of its folder. `has_chat`: its
    tokenizer has a chat template."""
    parts = [head(origin, has_chat), f"# {inline(title)}\n", summary(config, origin, dtype), changes(config, origin)]
    if figures:
        parts.append(f"## Figures\n\n{figures.strip()}\n")
    parts.append(loading(title, own_code, has_chat))
    parts.append(legal(origin))
    return "\n".join(parts)


def head(origin, has_chat):
    """The front matter, which is YAML. (A JSON string is one of YAML's, but for characters of two \\u.)"""
    lines = ["---"]
    if origin["name"]:
        remark = "" if "/" in origin["name"] else "      # a folder's name: before publishing put the hub's id here"
        lines.append(f"base_model: {json.dumps(origin['name'], ensure_ascii=False)}{remark}")
    for key in ("license", "license_name", "license_link"):
        if origin[key]:
            lines.append(f"{key}: {json.dumps(origin[key], ensure_ascii=False)}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", f"- {PROJECT}"]
    if is_cut(origin):
        lines.append("- pruned")
    if has_chat:
        lines.append("- conversational")
    return "\n".join([*lines, "---", ""])


def is_cut(origin):
    for step in origin["steps"]:
        prunes = step.get("command") in ("prune.py", "methods.sheared")
        cuts_while_adapting = step.get("command") == "methods.lora" and step.get("keep", 1) != 1
        if prunes or cuts_while_adapting:
            return True
    return False


def inline(text):
    """A text between backticks, which ends on its line."""
    plain = " ".join(str(text).split()).replace("`", "'")
    return f"`{plain}`"


def summary(config, origin, dtype):
    """A sentence about what the model is."""
    params = config.num_params()["total"]
    size = f"{params:,} parameters in {dtype}"
    if origin["name"] is None:
        return f"A language model of {size}, made by {PROJECT}.\n"
    if not origin["steps"]:
        return f"The language model {inline(origin['name'])} of {size}, in files that {PROJECT} wrote.\n"
    verb = "cut from" if is_cut(origin) else "made of"
    share = f" ({params / origin['params']:.1%} of {origin['params']:,})" if origin["params"] else ""
    return (f"A language model of {size}, {verb} {inline(origin['name'])}{share} by {PROJECT}. It is not that model: "
            "its weights were changed, and it can be wrong where that model is right.\n")


def changes(config, origin):
    """The model's widths, and what was done to it, with all settings."""
    lines = ["## What was changed" if origin["steps"] else "## What it is", "",
             f"The model has {config.n_layer} layers with {span(config.n_kv_head)} KV heads, {span(config.n_head)} "
             f"query heads and {span(config.d_ff)} neurons each, and an embedding of {config.vocab_size:,} tokens in "
             f"{config.d_model} dimensions.", ""]
    for number, step in enumerate(origin["steps"], start=1):
        step = {name: without_folder(value) for name, value in step.items()}
        lines += [f"{number}. {sentence(step)} The settings:", "",
                  "   ```json", f"   {json.dumps(step)}", "   ```", ""]
    return "\n".join(lines)


def without_folder(value):
    """A setting as a card may tell it: of an absolute path the last part, as the rest is its writer's own."""
    if isinstance(value, list):
        return [without_folder(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def span(widths):
    """The range of a width over the layers."""
    smallest = min(widths)
    largest = max(widths)
    return f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"


def sentence(step):
    """A step in words, as far as its settings say."""
    if step.get("command") == "prune.py":
        mended = "" if step.get("mend", "none") == "none" else f", mended by {inline(step['mend'])}"
        kept = f"Cut to {inline(step.get('keep'))} of its {RESOURCES.get(str(step.get('budget')), 'budget')}"
        structure = str(step.get("structure"))
        # As many weights are zero there as n:m says, whatever the setting of the kept fraction.
        if structure == "2:4":
            kept = "Two of each four weights were set to zero"
        elif ":" in structure:
            kept = "Weights were set to zero"
        elif structure == "weights":
            kept = f"All but {inline(step.get('keep'))} of its weights were set to zero"
        return (f"{kept} (structure {inline(step.get('structure'))}) by score {inline(step.get('score'))}, calibrated "
                f"on {words(step.get('data'))}{mended} (`prune.py`).")
    if step.get("command") == "methods.grow":
        return f"Grown, with new units by way {inline(step.get('how'))} (`methods.grow`)."
    if str(step.get("command")).startswith("methods."):
        return f"Made by {inline('python -m ' + step['command'])}."
    taught = f", taught by {inline(step['teacher'])}" if step.get("teacher") else ""
    zeros = ""
    if step.get("sparse"):
        zeros = f", with {inline(step['sparse'])} of the layers' weights held at zero"
    elif step.get("dense"):
        zeros = ", its zeros set free"
    return (f"Trained by plan {inline(step.get('plan'))} on {tokens(step)} of {words(step.get('data'))}{taught}{zeros} "
            "(`train.py`).")


def words(names):
    """One name, or a list of names, between backticks."""
    return inline(" ".join(map(str, names)) if isinstance(names, list) else names)


def tokens(step):
    """How many tokens a run of train.py had seen."""
    done = step.get("done")
    size = step.get("batch_tokens")
    if type(done) is not int or type(size) is not int:
        return "an unknown number of tokens"
    return f"{done * size:,} tokens"


def loading(title, own_code, has_chat):
    """How the model is loaded."""
    trusted = ", trust_remote_code=True" if own_code else ""
    lines = ["## How to load it", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             f"folder = {json.dumps(title)}", "tokenizer = AutoTokenizer.from_pretrained(folder)",
             f"model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=\"auto\"{trusted})"]
    if has_chat:
        lines += ["messages = [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]",
                  "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors=\"pt\", "
                  "return_dict=True)"]
    else:
        lines += ["inputs = tokenizer(\"The capital of France is\", return_tensors=\"pt\")"]
    lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))", "```", ""]
    if own_code:
        lines += ["Its layers have different widths, which no class of transformers has. So the folder brings "
                  "its own: `modeling_nanoprune.py`.", ""]
    lines += [f"In llama.cpp, with {PROJECT} at hand:", "", "```sh", "python export.py FOLDER --to gguf model.gguf",
              "llama-cli -m model.gguf -p \"The capital of France is\"", "```", ""]
    return "\n".join(lines)


def legal(origin):
    """Whose license it has."""
    lines = ["## License", ""]
    if origin["license"]:
        lines.append(f"That of the model it was made of: {inline(origin['license'])}.")
    elif origin["name"]:
        lines.append("The files of the model that it was made of name no license. Look it up before you publish "
                     "this one.")
    else:
        lines.append("Its maker's to say.")
    if origin["files"]:
        lines.append(f"Its legal texts are beside this file: {', '.join(origin['files'])}.")
    return "\n".join([*lines, ""])
