"""Files and runtimes of other projects: tokenizers, Hugging Face folders, GGUF files and stock llama.cpp. `data.py`,
`checkpoint.py` and `export.py` import from here; nothing in here knows of training or pruning."""
