"""Adapters in the format of the package `peft`: adapter_config.json and adapter_model.safetensors, out and in.

`forms.py` has the methods that can be written and read, each in a file of its own. The package itself is not needed.
"""
