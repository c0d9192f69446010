"""Distillation by logits: a student learns the next-token distributions of a teacher, on data or on its own samples."""
