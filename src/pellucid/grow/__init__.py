"""The main job: from raw text to a small model that reasons, is quantized, served, and calls tools."""
