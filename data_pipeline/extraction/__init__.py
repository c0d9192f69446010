"""Extraction of text from records: main text of web pages, text repair, URL blocklists, and limits on slow pages."""
