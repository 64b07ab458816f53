"""Python models around a language model: text to token ids, and token ids to text."""
