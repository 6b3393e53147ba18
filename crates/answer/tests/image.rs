//! What the answerer's machine code does not do.

use std::path::Path;
use std::process::Command;

use msrgate_answer::IMAGE;
use msrgate_answer::layout::image;

#[test]
fn the_answerer_calls_nothing_and_leaves_registers_alone_that_a_system_call_leaves_alone() {
    let elf = Path::new(env!("OUT_DIR")).join("answer.elf");
    let objdump = Command::new("objdump")
        .args(["-d", "--disassemble=run"])
        .arg(elf)
        .output();
    let objdump = match objdump {
        Ok(output) => output,
        Err(error) => return println!("skipped: objdump: {error}"),
    };
    let text = String::from_utf8(objdump.stdout).unwrap();
    let instructions: Vec<&str> = text.lines().filter_map(|line| line.split('\t').nth(2)).collect();
    assert!(instructions.len() > 100, "{text}");
    let is = |word: &str| {
        instructions
            .iter()
            .filter(|instruction| instruction.starts_with(word))
            .count()
    };
    // The stack pointer is the same from each KVM_RUN to the next, by which signals are found.
    assert_eq!(is("call"), 0, "{text}");
    assert!(is("syscall") > 0 && is("ret") == 1, "{text}");
    // `syscall` changes neither these nor the x87's.
    for registers in ["xmm", "ymm", "%st", "mm0"] {
        assert!(!text.contains(registers), "{registers}: {text}");
    }
}

#[test]
fn the_image_fits_a_page_and_begins_with_its_parameters() {
    assert!(IMAGE.len() <= 4096, "{}", IMAGE.len());
    let parameters = &IMAGE[image::PARAMETERS..][..image::COUNT * 8];
    assert!(parameters.iter().all(|byte| *byte == 0), "{parameters:x?}");
    assert_eq!(&IMAGE[2..image::PARAMETERS], image::KIND);
    // A short jump over them.
    assert_eq!(
        (IMAGE[0], 2 + usize::from(IMAGE[1])),
        (0xeb, image::PARAMETERS + image::COUNT * 8)
    );
}
