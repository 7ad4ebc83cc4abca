"""Pure logic of decoding: standard library only, no clock, thread, socket or tensor."""
