package CPANBridge::JSON;

use 5.010;
use strict;
use warnings;

use CPANBridge::JSON::Decoder;
use CPANBridge::JSON::Encoder;

our $VERSION = '0.1.0';

# Loading Cpanel::JSON::XS takes as long as decoding some 200 KB in pure Perl.
use constant WORTH_LOADING => 256 * 1024;

my $xs;               # a decoder; 0 when there is none that does the same
my $decoded = 0;      # bytes, until that question is decided

# What an XS decoder must get right before it is trusted with replies. JSON::XS is not even tried:
# it reads every tenth float wrong in the last digit.
my @PROBES = (
    '[0.1,3.141592653589793,1.7976931348623157e+308,5e-324,2.2250738585072014e-308,-0.0,1e22]',
    '[0.30000000000000004,123456.78901234567,9007199254740993.0,8.41e21,5.0e-5]',
    '[0,-1,2147483648,9007199254740993,-999999999999999999]',
    '["","\u00e9\ud83d\ude00\n\u0000",' . qq("\xc3\xa9\xf0\x9f\x98\x80","007","1.0"]),
    '{"a":[null,{"b":{}}],"\u00e9":[]}',
);

sub encode { goto &CPANBridge::JSON::Encoder::encode }

# As CPANBridge::JSON::Decoder::decode, faster where that can be had.
sub decode {
    my ($bytes) = @_;
    if (!defined $xs) {
        $decoded += length $bytes;
        $xs = _find_xs() if $decoded > WORTH_LOADING || $INC{'Cpanel/JSON/XS.pm'};
    }
    # Integers beyond 64 bits, and floats beyond the range of floats, are handled better here.
    if ($xs && $bytes !~ /[0-9]{19}|[eE]\+?[0-9]{3}/ && $bytes !~ /[^\x00-\x7f]/ | _is_odd($bytes)) {
        my $previous_error = $@;
        my $value          = eval { local $SIG{__DIE__}; [ $xs->decode($bytes) ] };
        my $error          = $@;
        $@ = $previous_error;
        return $value->[0] if $value;
        die $error if ref $error || $error !~ / at \S*CPANBridge/;    # a signal handler's
    }
    return CPANBridge::JSON::Decoder::decode($bytes);
}

1;
