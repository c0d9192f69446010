"""The documents that go on to the tokenizer: written without what stages cut, some of them held out."""
