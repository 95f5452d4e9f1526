"""The demo model: corpus and tokenizer, training samples, network, curriculum, checkpoint, scores."""
