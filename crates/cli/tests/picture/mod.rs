//! Pictures of a terminal, which the documents show: made of what commands print, and compared with it.

use std::fs;
use std::path::Path;

use anstyle_svg::{Palette, Term};

use super::command::{plain, without_times};

/// The colours of a terminal, bright enough to be read on its ground.
const COLOURS: Palette = {
    let mut colours = anstyle_svg::WIN10_CONSOLE;
    colours.0[1] = anstyle::RgbColor(0xff, 0x7b, 0x86);
    colours.0[2] = anstyle::RgbColor(0x7c, 0xd9, 0x92);
    colours.0[3] = anstyle::RgbColor(0xf0, 0xc6, 0x74);
    colours.0[9] = anstyle::RgbColor(0xff, 0x7b, 0x86);
    colours.0[12] = anstyle::RgbColor(0x8a, 0xb8, 0xff);
    colours
};
const INK: anstyle::RgbColor = anstyle::RgbColor(0xd9, 0xde, 0xe5);
const GROUND: anstyle::RgbColor = anstyle::RgbColor(0x14, 0x18, 0x1d);

/// Compares a picture's text with what commands show now, each behind its line, but for times. Where MSRGATE_WRITE_PICTURES is
/// set the picture is made anew instead.
pub(crate) fn check(name: &str, picture: &str, shown: &[(&str, String)]) {
    let lines = shown
        .iter()
        .map(|(line, printed)| format!("\u{1b}[1m$ {line}\u{1b}[0m\n{}\n", printed.trim_end()));
    let lines = lines.collect::<Vec<_>>().join("\n");
    if std::env::var_os("MSRGATE_WRITE_PICTURES").is_some() {
        let term = Term::new()
            .palette(COLOURS)
            .fg_color(INK.into())
            .bg_color(GROUND.into());
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../docs/pictures")
            .join(name);
        fs::write(path, term.render_svg(lines.trim_end())).expect("a picture");
        return;
    }
    assert_eq!(
        without_times(&text(picture)),
        without_times(&plain(lines.trim_end())),
        "docs/pictures/{name} is out of date: run `cargo xtask pictures`"
    );
}

/// The text of a picture.
fn text(picture: &str) -> String {
    let (_, text) = picture.split_once("<text").expect("a text");
    let parts = text
        .split('<')
        .map(|part| part.split_once('>').map_or("", |(_, text)| text));
    let text: String = parts.collect();
    let signs = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#x27;", "'"),
        ("&amp;", "&"),
    ];
    signs.iter().fold(text, |text, (sign, c)| text.replace(sign, c))
}
