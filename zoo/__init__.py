"""From layers to a model: the decoder template, its Hugging Face classes, presets and export."""
