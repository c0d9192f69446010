"""Trackers of a training run: W&B, MLflow, Prometheus and OpenTelemetry, each in a process of its own."""
