package subnet

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestScan(t *testing.T) {
	own := string(FormatValue(benchDual(7)))
	for _, tt := range []struct {
		value string
		ok    bool
	}{
		{own, true},
		{string(FormatValue(benchAttrs(7))), true},
		{`{"PublicIP":"192.168.1.10","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:fd:0c:11:22:33"}}`, true}, // flannel's
		{`{"PublicIP":"0.0.0.0","BackendType":"vxlan","BackendData":null,"BackendV6Data":{"VNI":0,"VtepMAC":""}}`, true},
		{`{"PublicIP":"x","BackendType":"host-gw","PublicIPLocal":false}`, true}, // what it means is checked after the scan
		{`{"NodeName":"a"}`, true},
		{`{"BackendData":{"VNI":4294967295}}`, true},

		{``, false},
		{`{}`, false},
		{`null`, false},
		{`[]`, false},
		{`}`, false},
		{own + " ", false},
		{own + own, false},
		{strings.TrimSuffix(own, "}"), false},
		{strings.Replace(own, ":", ": ", 1), false},
		{strings.ToLower(own), false},
		{`{"NodeID":"a","NodeName":"b"}`, false},
		{`{"NodeName":"a","NodeName":"b"}`, false},
		{`{"NodeName":"a",}`, false},
		{`{,"NodeName":"a"}`, false},
		{`{"NodeName":"a""NodeID":"b"}`, false},
		{`{"NodeName":}`, false},
		{`{"NodeName":`, false},
		{`{"NodeName":nul}`, false},
		{`{"NodeName":7}`, false},
		{`{"NodeName":"a`, false},
		{`{"NodeName":"\u0061"}`, false},
		{`{"NodeName":"é"}`, false},
		{"{\"NodeName\":\"\n\"}", false},
		{"{\"NodeName\":\"\x7f\"}", false},
		{`{"NodeName":"a","More":1}`, false},
		{`{"PublicIPLocal":1}`, false},
		{`{"BackendType":"wireguard","BackendData":{"PublicKey":"x+/="}}`, true},
		{`{"BackendType":"wireguard","BackendData":{"PublicKey":"x","VNI":1}}`, false},
		{`{"BackendData":{}}`, false},
		{`{"BackendData":{"VNI":01}}`, false},
		{`{"BackendData":{"VNI":-1}}`, false},
		{`{"BackendData":{"VNI":1.0}}`, false},
		{`{"BackendData":{"VNI":4294967296}}`, false},
		{`{"BackendData":{"VNI":99999999999999999999999999999}}`, false},
		{`{"BackendData":"x"}`, false},
	} {
		if _, ok := scanLease([]byte(tt.value)); ok != tt.ok {
			t.Errorf("%s: ok = %t, want %t", tt.value, ok, tt.ok)
		}
		checkScan(t, []byte(tt.value))
	}
}

// checkScan holds the fast reader against encoding/json.
func checkScan(t *testing.T, value []byte) {
	t.Helper()
	if fast, ok := scanVTEP(value); ok {
		var slow wireVTEP
		if err := json.Unmarshal(value, &slow); err != nil || fast != slow {
			t.Fatalf("%s: %+v, want %+v, %v", value, fast, slow, err)
		}
	}
	fast, ok := scanLease(value)
	if !ok {
		return
	}
	var slow wireLease
	if err := json.Unmarshal(value, &slow); err != nil {
		t.Fatalf("%s was taken: %v", value, err)
	}
	for _, raw := range []*json.RawMessage{&slow.BackendData, &slow.BackendV6Data} {
		if string(*raw) == "null" {
			*raw = nil
		}
	}
	if !reflect.DeepEqual(fast, slow) {
		t.Fatalf("%s:\n got %+v\nwant %+v", value, fast, slow)
	}
}

// Pieces of values, put together by chance: far more often than bytes are they something that could be mistaken for a
// value.
func TestScanOfPieces(t *testing.T) {
	pieces := []string{
		`{`, `}`, `,`, `null`, `true`, `0`, `1`, `""`, `"a"`, `"VNI":`, `"VtepMAC":`, `{"VNI":1,"VtepMAC":"a"}`,
		`"PublicIP":`, `"PublicIPv6":`, `"BackendType":`, `"BackendData":`, `"BackendV6Data":`, `"NodeName":`, `"NodeID":`,
		`"PublicIPLocal":`,
	}
	values, members := pieces[:12], pieces[9:]
	r, taken := newRand(t, 3), 0
	for range 300_000 {
		value := "{"
		for i := range r.IntN(4) {
			if i > 0 {
				value += ","
			}
			value += members[r.IntN(len(members))] + values[r.IntN(len(values))]
		}
		value += "}"
		if r.IntN(3) == 0 {
			at := r.IntN(len(value) + 1)
			value = value[:at] + pieces[r.IntN(len(pieces))] + value[at:]
		}
		if _, ok := scanLease([]byte(value)); ok {
			taken++
		}
		checkScan(t, []byte(value))
	}
	if taken < 1000 {
		t.Errorf("only %d of them were taken", taken)
	}
}

// An entry must not hold on to the message that it was read from.
func TestScanCopies(t *testing.T) {
	want := benchDual(7)
	value := FormatValue(want)
	e := ParseEntry("10.244.5.0-24", value, 1, 1, 1)
	for i := range value {
		value[i] = 'x'
	}
	if e.Attrs != want {
		t.Errorf("got %+v", e.Attrs)
	}
}

// FuzzScan: the two ways of reading a value agree on all that the fast one takes.
func FuzzScan(f *testing.F) {
	for _, v := range valueSeeds {
		f.Add([]byte(v))
	}
	f.Add(FormatValue(benchDual(7)))
	f.Add([]byte(`{"VNI":4294967295,"VtepMAC":"x"}`))
	f.Fuzz(func(t *testing.T, value []byte) { checkScan(t, value) })
}
