"""What a run is: strict sections (pydantic), the TOML loader, and presets beside them. Imports no torch."""
