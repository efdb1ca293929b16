"""Images, video and audio: probing, decoding and encoding."""
