"""HLS playlists as text."""

import pytest

from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.playlist import Variant, choose, parse_playlist

AT = "https://live.example/a/b.m3u8?token=1"
HEAD = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n"


def test_a_media_playlist_gives_its_segments_in_order():
    found = parse_playlist(
        "#EXTM3U\r\n#EXT-X-TARGETDURATION:4\r\n#EXT-X-MEDIA-SEQUENCE:7\r\n#EXTINF:3.5,title, with comma\r\n1.ts\r\n\r\n"
        "#EXT-X-DISCONTINUITY\r\n#EXTINF:4,\r\n#EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:00Z\r\n/c/2.ts?x=1\r\n",
        AT,
    )
    assert [(s.sequence, s.address, s.seconds, s.header, s.new_clock) for s in found.segments] == [
        (7, "https://live.example/a/1.ts", 3.5, None, False),
        (8, "https://live.example/c/2.ts?x=1", 4.0, None, True),
    ]
    assert (found.first_sequence, found.target, found.ended) == (7, 4.0, False)


def test_fragmented_mp4_has_a_header_until_another_is_named():
    found = parse_playlist(
        HEAD
        + '#EXT-X-MAP:URI="i.mp4"\n#EXTINF:4\n1.m4s\n#EXTINF:4\n2.m4s\n'
        + '#EXT-X-MAP:URI="j.mp4"\n#EXTINF:4\n3.m4s\n#EXT-X-ENDLIST\n',
        AT,
    )
    assert [s.header.rsplit("/", 1)[1] for s in found.segments] == ["i.mp4", "i.mp4", "j.mp4"]
    assert found.ended


def test_of_several_variants_the_cheapest_large_enough_is_chosen():
    found = parse_playlist(
        "#EXTM3U\n"
        "#EXT-X-STREAM-INF:BANDWIDTH=100,RESOLUTION=320x180\nsmall.m3u8\n"
        '#EXT-X-STREAM-INF:CODECS="avc1,mp4a",BANDWIDTH=900,RESOLUTION=1280x720\nlarge.m3u8\n'
        "#EXT-X-STREAM-INF:BANDWIDTH=500,RESOLUTION=640x360\nmiddle.m3u8\n",
        AT,
    )
    assert choose(found).address == "https://live.example/a/middle.m3u8"
    assert choose([Variant("a", 2, 180), Variant("b", 1, 240)]).address == "b"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "#EXTM3U"),
        ("<html>", "#EXTM3U"),
        ("#EXTM3U\n#EXTINF:4\n1.ts\n", "TARGETDURATION"),
        (HEAD + '#EXT-X-KEY:METHOD=AES-128,URI="k"\n#EXTINF:4\n1.ts\n', "encrypted"),
        (HEAD + "#EXTINF:4\n#EXT-X-BYTERANGE:100@0\n1.ts\n", "byte ranges"),
        (HEAD + '#EXT-X-MAP:URI="i.mp4",BYTERANGE="100@0"\n#EXTINF:4\n1.m4s\n', "byte ranges"),
        (HEAD + "1.ts\n", "EXTINF"),
        (HEAD + "#EXTINF:x\n1.ts\n", "number"),
        (HEAD + "#EXTINF:nan\n1.ts\n", "number"),
        (HEAD + "#EXT-X-MEDIA-SEQUENCE:-1\n#EXTINF:4\n1.ts\n", "number"),
        (HEAD + "#EXTINF:4\nfile:///etc/passwd\n", "neither http"),
        (HEAD + "#EXTINF:4\ndata:video/mp2t;base64,AAAA\n", "neither http"),
        (HEAD + "#EXTINF:4\n" + "a" * 9000, "too long"),
        (HEAD + "#\n" * 60_000, "lines"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n", "variant"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(text, why):
    with pytest.raises(VideoError, match=why) as error:
        parse_playlist(text, AT)
    assert error.value.code == "unsupported_playlist"


def test_a_key_of_none_is_no_encryption():
    assert parse_playlist(HEAD + "#EXT-X-KEY:METHOD=NONE\n#EXTINF:4\n1.ts\n", AT).segments
