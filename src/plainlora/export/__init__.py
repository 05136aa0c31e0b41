"""Writes an adapter, or the model merged with it, as a GGUF file, and proves how llama.cpp reads it."""
