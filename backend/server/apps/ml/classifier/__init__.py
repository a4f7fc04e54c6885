"""The classifiers: wrappers that differ only in the artifact they answer with."""
