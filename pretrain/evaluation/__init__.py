"""Evaluation of a whole model in one process: held-out text, tasks of lm-evaluation-harness, and HumanEval."""
