"""Convolution algorithms with one signature, each a pure torch reference."""
