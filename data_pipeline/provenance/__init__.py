"""From a document to the training steps that saw it, from a step to its documents, and a plan without some."""
