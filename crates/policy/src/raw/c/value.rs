//! Variables and arrays of integers of C.

use std::cell::Cell;
use std::collections::HashMap;

use super::cursor::Cursor;
use super::token::{Kind, Macros};
use crate::raw::RawError;

/// The most bytes that all variables of a text may take.
const MOST_BYTES: usize = 1 << 22;

/// A variable or an array of integers.
pub(super) struct Object {
    /// Its memory.
    pub(super) bytes: Vec<u8>,
    /// Bytes of one integer.
    pub(super) width: usize,
    /// Bytes of what one index is for.
    pub(super) stride: usize,
    /// Whether something that is not understood may have changed it.
    pub(super) doubted: bool,
}

/// Bytes of an integer type; `None` for what is no integer type.
pub(super) fn width(words: &[&str]) -> Option<usize> {
    let mut width = None;
    for word in words {
        let found = match *word {
            "static" | "const" | "volatile" | "register" | "extern" | "signed" | "__aligned" | "aligned" => continue,
            "unsigned" | "int" | "uint32_t" | "int32_t" | "__u32" | "__s32" | "u32" => width.unwrap_or(4),
            "char" | "bool" | "uint8_t" | "int8_t" | "__u8" | "__s8" | "u8" => 1,
            "short" | "uint16_t" | "int16_t" | "__u16" | "__s16" | "u16" => 2,
            "long" | "size_t" | "uint64_t" | "int64_t" | "__u64" | "__s64" | "u64" => 8,
            _ => return None,
        };
        width = Some(found);
    }
    width
}

/// All that is known by name.
pub(super) struct Objects {
    pub(super) macros: Macros,
    pub(super) objects: HashMap<String, Object>,
    bytes: usize,
    /// How many tokens of macros may still be read, each as often as the macro is used.
    pub(super) macro_tokens_left: Cell<usize>,
}

/// The most tokens of macros that are read: macros that use macros twice have a power of two.
const MOST_MACRO_TOKENS: usize = 1 << 20;

impl Objects {
    pub(super) fn new(macros: Macros) -> Objects {
        Objects {
            macros,
            objects: HashMap::new(),
            bytes: 0,
            macro_tokens_left: Cell::new(MOST_MACRO_TOKENS),
        }
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.objects.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Object> {
        self.objects.get(name)
    }

    pub(super) fn insert(&mut self, name: &str, object: Object) {
        self.objects.insert(name.to_owned(), object);
    }

    /// The bytes of the only array that there is.
    pub(super) fn only_bytes(&self) -> Option<&[u8]> {
        let mut arrays = self.objects.values().filter(|object| object.bytes.len() > object.width);
        let array = arrays.next().filter(|array| array.width == 1)?;
        arrays.next().is_none().then_some(&array.bytes)
    }

    /// Its value is no number any more that can be told.
    pub(super) fn doubt(&mut self, name: &str) {
        if let Some(object) = self.objects.get_mut(name) {
            object.doubted = true;
        }
    }

    /// What follows the name in a declaration: brackets, and an initialiser. Without one it is zero, as static
    /// variables are.
    pub(super) fn declared(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut object = self.array(cursor, width)?;
        if cursor.take("=") {
            if object.stride != width && object.stride != 0 {
                return Err(cursor.error("an array of arrays is zero here, or filled by assignments".to_owned()));
            }
            self.initialise(cursor, &mut object)?;
        }
        if object.stride == 0 {
            // `x[]` or a single value; either way an index is for one integer.
            object.stride = width;
        }
        Ok(object)
    }

    /// `[]) { … }` of a compound literal.
    pub(super) fn literal(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut object = self.array(cursor, width)?;
        cursor.want(")")?;
        self.initialise(cursor, &mut object)?;
        Ok(object)
    }

    /// Brackets: as many integers as they say. `stride` is 0 where they leave it to the initialiser.
    fn array(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut lengths: Vec<usize> = Vec::new();
        let mut open = false;
        while cursor.take("[") {
            if lengths.is_empty() && cursor.take("]") {
                open = true;
                break;
            }
            let length = self.number(cursor)?;
            cursor.want("]")?;
            let length = usize::try_from(length).ok().filter(|length| *length <= MOST_BYTES);
            lengths.push(length.ok_or_else(|| cursor.error("the array is too large for bitmaps".to_owned()))?);
        }
        let size = lengths.iter().try_fold(width, |size, length| size.checked_mul(*length));
        let size = if open { Some(0) } else { size };
        let first = lengths.first().copied().unwrap_or(1).max(1);
        let size = size.filter(|size| self.bytes + size <= MOST_BYTES);
        let size = size.ok_or_else(|| cursor.error("the array is too large for bitmaps".to_owned()))?;
        self.bytes += size;
        Ok(Object {
            bytes: vec![0; size],
            width,
            stride: if open { 0 } else { size / first },
            doubted: false,
        })
    }

    fn initialise(&mut self, cursor: &mut Cursor<'_>, object: &mut Object) -> Result<(), RawError> {
        let open = object.stride == 0;
        if let Some(text) = cursor.text() {
            let pointer = object.width == object.bytes.len();
            let open = open || pointer;
            let bytes = text.into_iter().chain(open.then_some(0));
            return bytes
                .enumerate()
                .try_for_each(|(at, byte)| self.put(cursor, object, open, at, byte.into()));
        }
        if !cursor.take("{") {
            let value = self.number(cursor)?;
            return self.put(cursor, object, open, 0, value);
        }
        let mut at = 0;
        while !cursor.take("}") {
            let mut last = at;
            if cursor.take("[") {
                at = self.index(cursor)?;
                last = at;
                if cursor.take("...") {
                    last = self.index(cursor)?;
                }
                cursor.want("]")?;
                cursor.want("=")?;
            }
            let value = self.number(cursor)?;
            for at in at..=last {
                self.put(cursor, object, open, at, value)?;
            }
            at = last + 1;
            if !cursor.take(",") {
                return cursor.want("}");
            }
        }
        Ok(())
    }

    fn index(&mut self, cursor: &mut Cursor<'_>) -> Result<usize, RawError> {
        let index = self.number(cursor)?;
        let index = usize::try_from(index).ok().filter(|index| *index <= MOST_BYTES);
        index.ok_or_else(|| cursor.error("the index is too large for bitmaps".to_owned()))
    }

    /// Stores an integer, as C converts it; an open array grows.
    fn put(
        &mut self,
        cursor: &Cursor<'_>,
        object: &mut Object,
        grows: bool,
        at: usize,
        value: u64,
    ) -> Result<(), RawError> {
        let end = (at + 1) * object.width;
        if grows && object.bytes.len() < end && self.bytes + end <= MOST_BYTES {
            self.bytes += end - object.bytes.len();
            object.bytes.resize(end, 0);
        }
        let place = object.bytes.get_mut(at * object.width..end);
        let place = place.ok_or_else(|| cursor.error("more is put into the array than it holds".to_owned()))?;
        for (byte, from) in place.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
        Ok(())
    }

    /// `[3] = 0xff;` or `|= 1;` behind a name.
    pub(super) fn assign(&mut self, name: &str, cursor: &mut Cursor<'_>) -> Result<(), RawError> {
        let offset = self.offset(name, cursor)?;
        let operator = match cursor.peek() {
            Some(Kind::Sign(sign @ ("|" | "&" | "^"))) => {
                cursor.at += 1;
                Some(*sign)
            }
            _ => None,
        };
        cursor.want("=")?;
        let value = self.number(cursor)?;
        let Some(mut object) = self.objects.remove(name) else {
            return Err(cursor.error(format!("`{name}` is not declared here")));
        };
        let place = object.bytes.get(offset..).unwrap_or_default();
        let mut bytes = [0; 8];
        bytes
            .iter_mut()
            .zip(place.iter().take(object.width))
            .for_each(|(byte, from)| *byte = *from);
        let before = u64::from_le_bytes(bytes);
        let value = match operator {
            Some("|") => before | value,
            Some("&") => before & value,
            Some(_) => before ^ value,
            None => value,
        };
        let at = offset.checked_div(object.width).unwrap_or(0);
        let put = self.put(cursor, &mut object, false, at, value);
        self.objects.insert(name.to_owned(), object);
        put
    }

    /// How far into a variable the brackets behind its name lead.
    pub(super) fn offset(&mut self, name: &str, cursor: &mut Cursor<'_>) -> Result<usize, RawError> {
        let mut offset = 0usize;
        let (mut stride, width) = self
            .objects
            .get(name)
            .map_or((1, 1), |object| (object.stride, object.width));
        loop {
            let scaled = match cursor.peek() {
                Some(Kind::Sign("[")) => {
                    cursor.at += 1;
                    let index = self.index(cursor)?;
                    cursor.want("]")?;
                    let scaled = index.checked_mul(stride);
                    stride = width;
                    scaled
                }
                Some(Kind::Sign("+")) => {
                    cursor.at += 1;
                    self.index(cursor)?.checked_mul(stride)
                }
                _ => return Ok(offset),
            };
            let sum = scaled.and_then(|scaled| offset.checked_add(scaled));
            offset = sum.ok_or_else(|| cursor.error("the index is too large for bitmaps".to_owned()))?;
        }
    }

    /// memset of a whole variable.
    pub(super) fn fill(&mut self, name: &str, byte: u64, length: u64) -> Result<(), String> {
        let object = self
            .objects
            .get_mut(name)
            .ok_or_else(|| format!("`{name}` is not declared here"))?;
        let place = usize::try_from(length)
            .ok()
            .and_then(|length| object.bytes.get_mut(..length));
        let place = place.ok_or_else(|| format!("memset of `{name}` goes beyond its end"))?;
        place.fill(byte.to_le_bytes().first().copied().unwrap_or(0));
        Ok(())
    }
}
