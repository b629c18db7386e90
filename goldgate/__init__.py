"""Decides whether a change to a RAG system may go live, and then makes it live."""

__version__ = "0.1.0"
