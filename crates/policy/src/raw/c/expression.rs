//! Constant expressions of C.

use super::cursor::Cursor;
use super::token::Kind;
use super::value::{Objects, width};
use crate::raw::{RawError, kernel_name};

/// How deep brackets and macros may go.
const DEEPEST: u32 = 64;

impl Objects {
    /// A constant expression, in 64 bits.
    pub(super) fn number(&self, cursor: &mut Cursor<'_>) -> Result<u64, RawError> {
        self.binary(cursor, 0, 0)
    }

    fn binary(&self, cursor: &mut Cursor<'_>, weakest: u8, depth: u32) -> Result<u64, RawError> {
        let mut left = self.unary(cursor, depth)?;
        while let Some(Kind::Sign(sign)) = cursor.peek() {
            let strength = match *sign {
                "|" => 1,
                "^" => 2,
                "&" => 3,
                "<<" | ">>" => 4,
                "+" | "-" => 5,
                "*" | "/" | "%" => 6,
                _ => break,
            };
            // `x |= 1` is an assignment and no sum.
            if strength <= weakest || matches!(cursor.ahead(1), Some(Kind::Sign("="))) {
                break;
            }
            cursor.at += 1;
            let right = self.binary(cursor, strength, depth)?;
            let shift = u32::try_from(right).unwrap_or(u32::MAX);
            let value = match *sign {
                "|" => Some(left | right),
                "^" => Some(left ^ right),
                "&" => Some(left & right),
                "<<" => left.checked_shl(shift),
                ">>" => left.checked_shr(shift),
                "+" => Some(left.wrapping_add(right)),
                "-" => Some(left.wrapping_sub(right)),
                "*" => Some(left.wrapping_mul(right)),
                "/" => left.checked_div(right),
                _ => left.checked_rem(right),
            };
            left = value.ok_or_else(|| cursor.error(format!("`{sign}` by {right} has no value")))?;
        }
        Ok(left)
    }

    fn unary(&self, cursor: &mut Cursor<'_>, depth: u32) -> Result<u64, RawError> {
        let depth = depth + 1;
        if depth > DEEPEST {
            return Err(cursor.error("brackets or macros go too deep".to_owned()));
        }
        match cursor.next() {
            Some(Kind::Number(number)) => Ok(*number),
            Some(Kind::Sign("~")) => Ok(!self.unary(cursor, depth)?),
            Some(Kind::Sign("-")) => Ok(self.unary(cursor, depth)?.wrapping_neg()),
            Some(Kind::Sign("+")) => self.unary(cursor, depth),
            Some(Kind::Sign("(")) => {
                let mut ahead = cursor.clone();
                let mut words: Vec<&str> = Vec::new();
                while let Some(Kind::Word(word)) = ahead.peek() {
                    words.push(word);
                    ahead.at += 1;
                }
                match width(&words) {
                    Some(width) if ahead.take(")") => {
                        *cursor = ahead;
                        let value = self.unary(cursor, depth)?;
                        let bits = 64 - 8 * u32::try_from(width).unwrap_or(8);
                        Ok(value << bits >> bits)
                    }
                    _ => {
                        let value = self.binary(cursor, 0, depth)?;
                        cursor.want(")")?;
                        Ok(value)
                    }
                }
            }
            Some(Kind::Word(word)) if word == "sizeof" => self.size(cursor),
            Some(Kind::Word(word)) => self.named(cursor, word, depth),
            _ => {
                cursor.at -= 1;
                Err(cursor.error(format!("a number is missing{}", cursor.before())))
            }
        }
    }

    /// `sizeof x` or `sizeof(x)`, of a variable, of its first element, or of a type.
    fn size(&self, cursor: &mut Cursor<'_>) -> Result<u64, RawError> {
        let bracket = cursor.take("(");
        let mut words = vec![cursor.word()?];
        while let Some(Kind::Word(word)) = cursor.peek() {
            words.push(word);
            cursor.at += 1;
        }
        let object = words.last().and_then(|name| self.objects.get(*name));
        let size = match (object, width(&words)) {
            (Some(object), _) => match cursor.take("[") {
                true => {
                    cursor.skip();
                    object.stride
                }
                false => object.bytes.len(),
            },
            (None, Some(width)) => width,
            (None, None) => return Err(cursor.error(format!("the size of `{}` is not known here", words.join(" ")))),
        };
        if bracket {
            cursor.want(")")?;
        }
        Ok(size as u64)
    }

    /// What the kernel's macros of this name make of their arguments, behind the bracket; `None` if it is none of them.
    fn called(&self, cursor: &mut Cursor<'_>, name: &str, depth: u32) -> Result<Option<u64>, RawError> {
        if name == "ARRAY_SIZE" {
            let array = cursor.word()?;
            let object = self.objects.get(array);
            let object = object.ok_or_else(|| cursor.error(format!("the size of `{array}` is not known here")))?;
            cursor.want(")")?;
            return Ok(object
                .bytes
                .len()
                .checked_div(object.stride)
                .map(|length| length as u64));
        }
        let arguments = match name {
            "BIT" | "BIT_ULL" | "BIT64" | "UINT64_C" | "UINT32_C" => 1,
            "GENMASK" | "GENMASK_ULL" | "DIV_ROUND_UP" => 2,
            _ => return Ok(None),
        };
        let first = self.binary(cursor, 0, depth)?;
        let second = match arguments {
            1 => 0,
            _ => {
                cursor.want(",")?;
                self.binary(cursor, 0, depth)?
            }
        };
        cursor.want(")")?;
        let shift = |value: u64, by: u64| value.checked_shl(u32::try_from(by).unwrap_or(u32::MAX));
        let value = match name {
            "UINT64_C" | "UINT32_C" => Some(first),
            "DIV_ROUND_UP" => first
                .checked_next_multiple_of(second)
                .and_then(|sum| sum.checked_div(second)),
            "GENMASK" | "GENMASK_ULL" => {
                shift(u64::MAX, second)
                    .filter(|_| second <= first && first < 64)
                    .map(|mask| {
                        let above = 63 - first;
                        mask << above >> above
                    })
            }
            _ => shift(1, first),
        };
        let value = value.ok_or_else(|| cursor.error(format!("`{name}` of these numbers has no value")))?;
        Ok(Some(value))
    }

    fn named(&self, cursor: &mut Cursor<'_>, name: &str, depth: u32) -> Result<u64, RawError> {
        if let Some(tokens) = self.macros.get(name) {
            let left = self.macro_tokens_left.get().checked_sub(tokens.len());
            let left = left.ok_or_else(|| cursor.error("macros come to too much here: give the number".to_owned()))?;
            self.macro_tokens_left.set(left);
            let mut inner = Cursor { tokens, at: 0 };
            let value = self.binary(&mut inner, 0, depth)?;
            return match inner.peek() {
                None => Ok(value),
                Some(_) => Err(inner.error(format!("`{name}` is no number"))),
            };
        }
        if cursor.is("(") {
            let mut ahead = cursor.clone();
            ahead.at += 1;
            if let Some(value) = self.called(&mut ahead, name, depth)? {
                *cursor = ahead;
                return Ok(value);
            }
        }
        if let Some(object) = self.objects.get(name)
            && object.bytes.len() == object.width
            && !object.doubted
        {
            let mut bytes = [0; 8];
            bytes
                .iter_mut()
                .zip(&object.bytes)
                .for_each(|(byte, from)| *byte = *from);
            return Ok(u64::from_le_bytes(bytes));
        }
        let known = match name {
            "BITS_PER_BYTE" | "CHAR_BIT" => Some(8),
            "BITS_PER_LONG" | "BITS_PER_LONG_LONG" => Some(64),
            "UINT64_MAX" | "U64_MAX" | "ULLONG_MAX" | "ULONG_MAX" => Some(u64::MAX),
            "UINT32_MAX" | "U32_MAX" | "UINT_MAX" => Some(u64::from(u32::MAX)),
            "UINT8_MAX" | "U8_MAX" | "UCHAR_MAX" => Some(u64::from(u8::MAX)),
            "true" => Some(1),
            "false" => Some(0),
            name => kernel_name(name).or_else(|| msrgate_msrs::by_name(name).map(|entry| u64::from(entry.msr.0))),
        };
        known.ok_or_else(|| {
            cursor.error(format!(
                "`{name}` is not known here: give its number, or `#define` it in the same text"
            ))
        })
    }
}
