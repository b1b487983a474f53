"""Text to audio: reference voice, chunks of text, batches, sampling, decoding and joining."""
