"""vocabfold: fold the vocabulary of a language model where it costs: head, embedding, stored tokens, decoding."""
