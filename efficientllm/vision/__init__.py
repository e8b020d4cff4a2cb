"""Pictures as a vision-language model reads them: sizes, patches, the slots of a tower, tokens and their positions."""
