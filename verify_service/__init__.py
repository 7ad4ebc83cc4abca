"""The verify service: the large model that alone decides the output. It never drafts."""
