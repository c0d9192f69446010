"""Configs of all commands: strict schemas (pydantic), the TOML loader, and presets as TOML files. Imports no torch."""
