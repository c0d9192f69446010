"""A small n-gram model in ARPA format."""

SMALL = """\
\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.9\t</s>
-0.7\ta\t-0.2
-0.8\tb\t-0.3

\\2-grams:
-0.4\t<s> a\t-0.1
-0.6\ta b\t-0.25
-0.5\tb </s>

\\3-grams:
-0.2\t<s> a b

\\end\\
"""
