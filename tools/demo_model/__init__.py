"""The demo model: text, tokenizer, samples, network, curriculum, checkpoint, scores."""
