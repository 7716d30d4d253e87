package subnet

import (
	"bytes"
	"encoding/json"
	"math"
)

// Nearly every value was written by FormatValue, and reading five thousand of them is most of what a node computes when
// it starts. What stands here reads that one layout, at a fraction of what encoding/json takes for it in time and
// garbage: the keys in their order, no white space, plain ASCII without escapes. To whatever differs from it by a byte
// it says no, and encoding/json has its say.

// scanLease reads the layout of FormatValue, with or without flannel's nulls; ok is false for any other.
func scanLease(value []byte) (w wireLease, ok bool) {
	s := newScanner(value)
	w.PublicIP = string(s.text("PublicIP"))
	w.PublicIPv6 = string(s.text("PublicIPv6"))
	w.BackendType = backendType(s.text("BackendType"))
	w.BackendData = s.vtep("BackendData")
	w.BackendV6Data = s.vtep("BackendV6Data")
	w.NodeName = string(s.text("NodeName"))
	w.NodeID = string(s.text("NodeID"))
	w.PublicIPLocal = s.bool("PublicIPLocal")
	return w, s.end() && len(s.rest) == 0
}

// scanVTEP reads the data of a lease's tunnel end in the same layout.
func scanVTEP(raw []byte) (wireVTEP, bool) {
	s := newScanner(raw)
	v := wireVTEP{s.number("VNI"), string(s.text("VtepMAC")), string(s.text("PublicKey"))}
	return v, s.end() && len(s.rest) == 0
}

// backendType is the constant where there is one: a table has the text once, and not in every entry.
func backendType(b []byte) BackendType {
	switch BackendType(b) {
	case VXLAN:
		return VXLAN
	case HostGW:
		return HostGW
	case WireGuard:
		return WireGuard
	}
	return BackendType(b)
}

// scanner goes through an object, member by member. Each of its methods for a member gives nothing where that is not
// the next one, and gives up where its value is none that it knows.
type scanner struct {
	rest []byte // nil once it gave up: nothing is found in that
	sep  byte   // before the next member: the opening brace, then commas
}

func newScanner(b []byte) scanner { return scanner{b, '{'} }

// skip goes behind a text, if that is what comes next.
func (s *scanner) skip(text string) bool {
	found := len(s.rest) >= len(text) && string(s.rest[:len(text)]) == text
	if found {
		s.rest = s.rest[len(text):]
	}
	return found
}

// end goes behind the closing brace, if that is what comes next. An object without members is none of ours.
func (s *scanner) end() bool { return s.sep == ',' && s.skip("}") }

// member goes to the value of a member, if that is what comes next. A null is the same as none.
func (s *scanner) member(name string) bool {
	n := len(name)
	if len(s.rest) < n+4 || s.rest[0] != s.sep || s.rest[1] != '"' ||
		string(s.rest[2:n+2]) != name || s.rest[n+2] != '"' || s.rest[n+3] != ':' {
		return false
	}
	s.rest, s.sep = s.rest[n+4:], ','
	return !s.skip("null")
}

func (s *scanner) text(name string) []byte {
	if !s.member(name) {
		return nil
	}
	if s.skip(`"`) {
		if end := bytes.IndexByte(s.rest, '"'); end >= 0 && plain(s.rest[:end]) {
			out := s.rest[:end]
			s.rest = s.rest[end+1:]
			return out
		}
	}
	s.rest = nil
	return nil
}

// plain reports whether a string stands in JSON as it is.
func plain(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' || c == '\\' {
			return false
		}
	}
	return true
}

func (s *scanner) number(name string) uint32 {
	if !s.member(name) {
		return 0
	}
	n, digits := uint64(0), 0
	for digits < len(s.rest) && n <= math.MaxUint32 && '0' <= s.rest[digits] && s.rest[digits] <= '9' {
		n = 10*n + uint64(s.rest[digits]-'0')
		digits++
	}
	if digits == 0 || n > math.MaxUint32 || digits > 1 && s.rest[0] == '0' {
		s.rest = nil
		return 0
	}
	s.rest = s.rest[digits:]
	return uint32(n)
}

func (s *scanner) bool(name string) bool {
	if !s.member(name) {
		return false
	}
	yes := s.skip("true")
	if !yes && !s.skip("false") {
		s.rest = nil
	}
	return yes
}

// vtep goes behind an object that scanVTEP reads.
func (s *scanner) vtep(name string) json.RawMessage {
	if !s.member(name) {
		return nil
	}
	in := newScanner(s.rest)
	in.number("VNI")
	in.text("VtepMAC")
	in.text("PublicKey")
	if !in.end() {
		s.rest = nil
		return nil
	}
	out := s.rest[:len(s.rest)-len(in.rest)]
	s.rest = in.rest
	return out
}
