"""Reads rows, checks them, renders them with the chat template and turns them into tokens."""
