"""A tokenizer whose tokens are the bytes of the text, so that a test can read a window."""

from collections.abc import Sequence


class ByteTokenizer:
    """Token ``b`` is byte ``b``; 256 begins a text where ``bos`` is set, 257 would end it and never appears."""

    bos_token_id = 256
    eos_token_id = 257
    pad_token_id = None
    all_special_ids = (256, 257)
    chat_template: str | None = None

    def __init__(self, *, bos: bool = False) -> None:
        self.bos = bos

    def __len__(self) -> int:
        return 258

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: bool) -> dict[str, list[int]]:
        first = [self.bos_token_id] if self.bos and add_special_tokens else []
        return {"input_ids": [*first, *text.encode()]}

    def batch_decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [bytes(token for token in row if token < 256).decode(errors="replace") for row in rows]

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **options: bool) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    @staticmethod
    def read(tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return bytes(tokens).decode()
