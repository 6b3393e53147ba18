//! The pictures of commands that need no KVM.

use crate::command::{Folder, Terminal, on_terminal};
use crate::picture;

#[test]
fn the_picture_of_check_is_what_it_shows() {
    let folder = Folder::furnished();
    folder.write(
        "guest.toml",
        "version = 1\nname    = \"guest\"\ndefault = \"deny\"\nextends = \"policies/linux-microvm.toml\"\n\n\
         [[rule]]\nmsr  = \"IA32_BIOS_SIGN\"\nread = { value = \"0x100000000\" }\n\n\
         [[rule]]\nmsr  = \"0x611\"\nread = \"alow\"\n",
    );
    let shown = on_terminal(folder.command(&["check", "guest.toml"]), 110, Terminal::Both);
    let picture = include_str!("../../../../docs/pictures/check.svg");
    picture::check("check.svg", picture, &[("msrgate check guest.toml", shown)]);
}
