"""answers -> report -> verdict."""
