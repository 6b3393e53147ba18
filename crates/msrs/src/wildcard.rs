//! Patterns of `*` and `?`.

/// Whether a pattern of `*` and `?` matches the whole of a text.
pub(crate) fn matches(mut pattern: &[u8], mut text: &[u8]) -> bool {
    // What to go on with if the rest fails: the pattern after the last `*`, and the text that it may yet swallow.
    // Only the last `*` needs it: an earlier one that swallows more leaves less for the later ones.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match (pattern, text) {
            ([], []) => return true,
            ([b'*', rest @ ..], _) => {
                pattern = rest;
                retry = Some((rest, text));
                continue;
            }
            ([wanted, rest @ ..], [byte, text_rest @ ..]) if *wanted == b'?' || wanted.eq_ignore_ascii_case(byte) => {
                (pattern, text) = (rest, text_rest);
                continue;
            }
            _ => {}
        }
        let Some((after, [_, swallowed @ ..])) = retry else {
            return false;
        };
        retry = Some((after, swallowed));
        (pattern, text) = (after, swallowed);
    }
}
