"""Language and vision-language models, their files, and what they write."""
