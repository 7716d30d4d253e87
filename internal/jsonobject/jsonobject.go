// Package jsonobject reads and edits JSON objects key by key. Keys are found as encoding/json finds the fields of a
// struct: in any letter case, and the last one counts.
package jsonobject

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Object is a JSON object as it stands in the text. Nil is what null leaves, and no object.
type Object []Field

// Field is a key with its value.
type Field struct {
	Key   string
	Value json.RawMessage
}

// UnmarshalJSON reads an object; for anything else the error is encoding/json's for a map.
func (o *Object) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &map[string]json.RawMessage{}); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); t == nil { // null
		return err
	}
	for *o = (Object{}); dec.More(); {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		f := Field{Key: key.(string)} // the decoder takes nothing else for a key
		if err := dec.Decode(&f.Value); err != nil {
			return err
		}
		*o = append(*o, f)
	}
	return nil
}

// MarshalJSON writes the fields in the order of their keys: equal objects have equal texts.
func (o Object) MarshalJSON() ([]byte, error) {
	fields := map[string]json.RawMessage{}
	for _, f := range o {
		fields[f.Key] = f.Value
	}
	return json.Marshal(fields)
}

// Get returns the value of a key, nil where there is none. A null counts only where nothing else does.
func (o Object) Get(key string) json.RawMessage {
	var raw json.RawMessage
	for _, f := range o {
		if strings.EqualFold(f.Key, key) && (raw == nil || string(f.Value) != "null") {
			raw = f.Value
		}
	}
	return raw
}

// Put sets a key, whatever stood there.
func (o *Object) Put(key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	o.Delete(key)
	*o = append(*o, Field{key, raw})
	return nil
}

// PutAll sets several keys.
func (o *Object) PutAll(fields map[string]any) error {
	for key, v := range fields {
		if err := o.Put(key, v); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes a key.
func (o *Object) Delete(key string) {
	*o = slices.DeleteFunc(*o, func(f Field) bool { return strings.EqualFold(f.Key, key) })
}

// Decode reads the value of a key into v, which stays as it is where there is none, or null. The error says what was
// expected and found.
func (o Object) Decode(key string, v any, expected string) error {
	if raw := o.Get(key); raw != nil && json.Unmarshal(raw, v) != nil {
		return Unexpected(key, expected, raw)
	}
	return nil
}

// Unexpected is the error for a value that is not what was expected.
func Unexpected(path, expected string, found []byte) error {
	return fmt.Errorf("%s: expected %s, found %s", path, expected, Excerpt(found))
}

// Excerpt shows a piece of bad input on one line.
func Excerpt(raw []byte) string {
	const most = 40
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	var compact bytes.Buffer
	valid := json.Compact(&compact, raw) == nil
	if valid {
		raw = compact.Bytes()
	}
	switch {
	case len(bytes.TrimSpace(raw)) == 0:
		return "nothing"
	case len(raw) > most:
		return fmt.Sprintf("%.*q…", most, raw)
	case valid && !bytes.ContainsFunc(raw, unprintable):
		return string(raw)
	}
	return fmt.Sprintf("%q", raw)
}
