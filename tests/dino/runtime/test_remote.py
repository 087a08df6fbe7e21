"""URLs and the names in them; downloads are tested with the command that makes them."""

import pytest

from dino.runtime.options import UserError
from dino.runtime.remote import download, is_url, name_in_url


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/b.jpg", "b.jpg"),
        ("http://host/my%20cat.png?size=3#top", "my cat.png"),
        ("https://host/", "download"),
        ("https://host", "download"),
        ("https://host/..", "download"),
        ("https://host/..%2F..%2Fetc%2Fpasswd", "passwd"),
    ],
)
def test_a_file_is_called_as_in_the_url(url, name):
    assert is_url(url) and name_in_url(url) == name


def test_a_path_is_no_url():
    assert not is_url("photos/a.jpg") and not is_url("C:/a.jpg") and not is_url("file:///a.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "two words.jpg"])
def test_what_cannot_be_had_is_one_sentence(name, tmp_path):
    with pytest.raises(UserError, match=f"cannot download http://127.0.0.1:9/{name}: .*is there a network"):
        download(f"http://127.0.0.1:9/{name}", tmp_path)
    assert list(tmp_path.iterdir()) == []
