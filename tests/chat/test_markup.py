"""Answers as HTML: nothing of them is markup, and no probability is told by colour alone."""

from html.parser import HTMLParser
from pathlib import Path

from plainlora.chat import markup
from plainlora.chat.tokens import Token

EVIL = "<script>alert('\"1\"')</script> & <img src=x onerror=alert(2)>\n"
TOKENS = [
    Token(EVIL, 0.05, [(EVIL, 0.6), ("b", 0.05)]),
    Token(" likely", 0.93, [(" likely", 0.93)]),
    Token("rare", 0.0001, [("x", 0.999)]),
]


class Read(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_a_model_or_a_person_says_is_text() -> None:
    for page in (
        markup.answer(TOKENS),
        markup.text(EVIL),
        markup.error(EVIL),
        markup.note(EVIL),
        markup.who(EVIL, EVIL),
    ):
        read = Read(page)
        assert not {tag for tag, _ in read.tags} & {"script", "img"}
        assert not any(name.startswith("on") for _, given in read.tags for name in given)
        assert "<script>alert(" in read.text


def test_each_token_has_its_probability_and_what_else_it_might_have_been() -> None:
    read = Read(markup.answer(TOKENS))
    spans = [given for tag, given in read.tags if tag == "span"]
    assert [given["class"] for given in spans] == ["pl-token pl-unlikely", "pl-token", "pl-token pl-unlikely"]
    assert [given["style"] for given in spans] == ["--doubt:0.95", "--doubt:0.07", "--doubt:1.00"]
    assert spans[1]["data-tip"] == "␣likely 93.0%; most probable: ␣likely 93.0%"
    assert spans[2]["data-tip"] == "rare < 0.1%; most probable: x 99.9%"
    assert "rare< 0.1%x 99.9%" in read.text  # the table, for those who do not see or point


def test_a_picture_is_inside_the_page(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"png")
    ((tag, given),) = Read(markup.picture(tmp_path / "loss.png", 'a "loss"')).tags
    assert (tag, given["alt"], given["src"]) == ("img", 'a "loss"', "data:image/png;base64,cG5n")
