"""LR-Ray: recycle LoRAs of one Vision Transformer into a backbone that classifies new few-shot tasks."""
